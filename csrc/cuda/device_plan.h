// Plans as the kernels read them: of the records of plan.h what a probe has, with the stores it
// reads.
//
// A small plan travels inside the arguments of a launch, so that nothing is copied beforehand and a
// captured graph holds its own. A larger one is written to device memory by launches that carry it
// piece by piece, which a graph captures too.

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "../cpu/lookup.h"

namespace embcompress {
namespace cuda {

// The record so many words after another one of its feature; none at 0.
template <typename T>
EMBCOMPRESS_INLINE const T* record_after(const void* record, int64_t words) {
    if (words == 0) return nullptr;
    return reinterpret_cast<const T*>(static_cast<const int64_t*>(record) + words);
}

// A table of codes or slots and its bytes.
struct BoundTable {
    CodeTable codes;
    const void* data;
    int64_t bytes;
};

// Codes that give a row, and where absent ids go.
struct BoundCode {
    BoundTable table;
    int64_t has_otherwise;
    Address otherwise;
    int64_t other_at;  // the table in which that address is looked up

    EMBCOMPRESS_INLINE const BoundTable* other() const {
        return record_after<BoundTable>(this, other_at);
    }
};

// A sign or weight that multiplies a row.
struct BoundScale {
    ScaleKind kind;
    int64_t key;
    int64_t column;
    Address address;
    StoreView store;
    int64_t code_at;

    EMBCOMPRESS_INLINE const BoundCode* code() const {
        return record_after<BoundCode>(this, code_at);
    }
};

// Steps and biases of packed or latent numbers.
struct BoundSteps {
    StoreView step;
    StoreView bias;
    int32_t has_bias;
    int32_t per_row;
    int64_t per_column;
};

// What most probes lack follows the probes of a feature: a plan of many tables is small.
struct BoundProbe {
    StoreView store;
    Address address;
    int64_t offset;
    int32_t column;
    int32_t width;
    int32_t bits;            // of packed or latent numbers; 0: floats
    int32_t vector_columns;  // 8, 4 or 2 columns of a row can be read at once; 1: one by one
    int32_t staged_at;       // where the rows are put in shared memory; -1: nowhere
    int32_t code_at;
    int32_t scale_at;
    int32_t steps_at;

    EMBCOMPRESS_INLINE const BoundCode* code() const {
        return record_after<BoundCode>(this, code_at);
    }
    EMBCOMPRESS_INLINE const BoundScale* scale() const {
        return record_after<BoundScale>(this, scale_at);
    }
    EMBCOMPRESS_INLINE const BoundSteps* steps() const {
        return record_after<BoundSteps>(this, steps_at);
    }
};

struct BoundFeature {
    int64_t num_embeddings;
    int64_t padding_idx;
    Pool pool;
    Combine combine;
    int64_t width;
    int64_t out_column;
    int64_t num_probes;
    int64_t records;    // where its probes begin in the plan
    int64_t num_words;  // of its probes and what follows them
};

// What a store whose gradient is wanted is to a probe.
enum class Role : int32_t { kRows, kScale, kStep, kBias };

// A touch of a wanted store by every id of a feature.
struct Use {
    int32_t probe;  // of the feature; -1: the feature has fewer touches than others
    Role role;
    int64_t target;  // position among the wanted stores
};

// A wanted store: where its gradient goes, or what an update changes.
struct Target {
    float* data;
    float* first;
    float* second;
    int64_t rows;
    int64_t width;
    int32_t round;     // tables that share a tensor are updated one after the other
    float adam_scale;  // lr * sqrt(1 - beta2^step) / (1 - beta1^step)
};

// Where the arrays of a plan begin, in 8-byte words.
struct PlanLayout {
    int32_t features;
    int32_t uses;  // uses_per_feature for each feature
    int32_t targets;
    int32_t order;  // numbers of the features, class by class
    int32_t num_words;
    int32_t num_features;
    int32_t uses_per_feature;
    int32_t num_targets;
    int32_t most_probes;  // of a feature
};

constexpr int kThreads = 256;  // of a block, at most
constexpr int kInlineWords = 464;
// A launch takes arguments of 32,764 bytes (CUDA 12.1 and later).
constexpr int kPieceWords = 4000;

struct PlanArgument {
    const int64_t* memory;  // nullptr: the words below
    PlanLayout layout;
    int64_t words[kInlineWords];
};

// A piece of a plan on its way to device memory.
struct PlanPiece {
    int64_t words[kPieceWords];
    int32_t count;
};

static_assert(sizeof(BoundProbe) == 13 * 8 && sizeof(Use) == 16 && sizeof(Target) == 48,
              "the arrays of a plan are counted in words");

class PlanWords {
  public:
    PlanLayout layout{};
    std::vector<int64_t> words;

    template <typename T>
    int32_t add(const T* records, int64_t count) {
        const int32_t at = static_cast<int32_t>(words.size());
        const int64_t size = (count * static_cast<int64_t>(sizeof(T)) + 7) / 8;
        words.resize(words.size() + size);
        if (count > 0) std::memcpy(words.data() + at, records, count * sizeof(T));
        return at;
    }

    bool fits_inline() const { return words.size() <= kInlineWords; }
};

}  // namespace cuda
}  // namespace embcompress
