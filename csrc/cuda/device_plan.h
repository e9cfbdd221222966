// Plans as the kernels read them: the records of plan.h, each probe with the stores it reads.
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

// A store of codes or slots.
struct CodeBytes {
    const void* data;
    int64_t bytes;
};

struct BoundProbe {
    Probe probe;
    StoreView store;
    StoreView scale;
    CodeBytes codes;
    CodeBytes other_codes;
    CodeBytes scale_codes;
    CodeBytes other_scale_codes;
    StoreView step;
    StoreView bias;
    int32_t vector_columns;  // 8 or 4 columns of a row can be read at once; 1: one by one
    int32_t staged_at;       // where the rows are put in shared memory; -1: nowhere
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
    int32_t probes;
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

struct PlanArgument {
    const int64_t* memory;  // nullptr: the words below
    PlanLayout layout;
    int64_t words[kInlineWords];
};

// A piece of a plan on its way to device memory.
struct PlanPiece {
    int64_t words[kInlineWords];
    int32_t count;
};

static_assert(sizeof(BoundProbe) % 8 == 0 && sizeof(Use) == 16 && sizeof(Target) == 48,
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
