// What a lookup reads: stores, ids, bags, and the encoded plans of its features.

#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "../numbers.h"

namespace embcompress {

struct StoreView {
    const void* data;
    Dtype dtype;
    int64_t rows;   // of float stores; what a sparse one keeps
    int64_t width;  // of float stores; 0: of a sparse one, packed
    int64_t bytes;
};

struct Lookup {
    Header header;
    const Feature* features;
    const Probe* probes;
    std::vector<StoreView> stores;

    const void* ids;
    bool ids_are_32_bit;
    const void* offsets;  // nullptr: every id is a bag of its own; else of the ids' type
    int64_t num_offsets;  // the end of the last bag may be left out: it is num_ids
    const void* weights;  // per-sample weights, or nullptr
    Dtype weights_dtype;
    int64_t num_ids;
    int64_t batch;  // bags of each feature
    int64_t longest_bag;

    int64_t id(int64_t position) const {
        return ids_are_32_bit ? static_cast<const int32_t*>(ids)[position]
                              : static_cast<const int64_t*>(ids)[position];
    }

    // Bags are numbered feature-major: bag b of feature f is f * batch + b.
    int64_t offset(int64_t bag) const {
        if (offsets == nullptr) return bag;
        if (bag == num_offsets) return num_ids;
        return ids_are_32_bit ? static_cast<const int32_t*>(offsets)[bag]
                              : static_cast<const int64_t*>(offsets)[bag];
    }
};

// Shortest and longest bag, by differences that wrap. Offsets that begin at 0 and end at num_ids
// rise from one to the other where no bag is shorter than 0 or longer than num_ids.
struct Lengths {
    int64_t shortest;
    int64_t longest;
};
Lengths bag_lengths(const Lookup& lookup);

// Where the bags of a feature begin among the ids, and where they end.
struct Range {
    int64_t begin;
    int64_t end;
    int64_t size() const { return end - begin; }
};
inline Range ids_of(const Lookup& lookup, int64_t feature) {
    return {lookup.offset(feature * lookup.batch), lookup.offset((feature + 1) * lookup.batch)};
}

// The forward pass: `out` is float32, batch rows of header.num_columns. Returns false if an id
// was outside the vocabulary; nothing was read out of bounds then, and `out` is unspecified.
bool lookup_forward(const Lookup& lookup, float* out, int num_threads);

// Vectors of samples [begin, end) of a feature before its head, (end - begin, width) float32.
bool pool_before_head(const Lookup& lookup, int64_t feature, int64_t begin, int64_t end,
                      float* out);

// Gradient of the per-sample weights, (num_ids,) float32.
bool weights_gradient(const Lookup& lookup, const float* grad, float* out, int num_threads);

// Runs f(part) for part = 0 … parts - 1, in parallel; given by the binding.
void parallel_parts(int parts, void (*f)(int part, void* context), void* context);

template <typename F>
void parallel(int parts, const F& f) {
    if (parts <= 1) {
        for (int part = 0; part < parts; ++part) f(part);
        return;
    }
    parallel_parts(
        parts, [](int part, void* context) { (*static_cast<const F*>(context))(part); },
        const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace embcompress
