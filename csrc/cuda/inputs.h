// Ids, offsets and weights of a lookup on the device, each checked where it is read.

#pragma once

#include "../numbers.h"
#include "runtime.h"

namespace embcompress {
namespace cuda {

// Set by kernels, read by the host when it comes by; in memory that both see.
struct Errors {
    int ids;      // an id was outside the vocabulary
    int offsets;  // offsets did not rise from 0 to the number of ids
};

struct Inputs {
    const void* ids;
    const void* offsets;  // nullptr: every id is a bag of its own
    const void* weights;  // nullptr: none
    int64_t num_ids;
    int64_t num_offsets;
    int64_t batch;
    int64_t num_columns;
    Errors* errors;
    Dtype weights_dtype;
    bool ids_are_32_bit;

    EMBCOMPRESS_INLINE int64_t id(int64_t position) const {
        return ids_are_32_bit ? static_cast<const int32_t*>(ids)[position]
                              : static_cast<const int64_t*>(ids)[position];
    }

    EMBCOMPRESS_INLINE int64_t offset(int64_t bag) const {
        if (offsets == nullptr) return bag;
        if (bag == num_offsets) return num_ids;
        return ids_are_32_bit ? static_cast<const int32_t*>(offsets)[bag]
                              : static_cast<const int64_t*>(offsets)[bag];
    }

    EMBCOMPRESS_INLINE int64_t clamp(int64_t offset) const {
        return offset < 0 ? 0 : (offset > num_ids ? num_ids : offset);
    }

    // Whether a bag's ends are right: all of them are where all bags' are.
    EMBCOMPRESS_INLINE bool is_bag(int64_t bag, int64_t num_bags) const {
        const int64_t begin = offset(bag), end = offset(bag + 1);
        return begin >= 0 && begin <= end && end <= num_ids && (bag > 0 || begin == 0) &&
               (bag + 1 < num_bags || end == num_ids);
    }

    EMBCOMPRESS_INLINE float weight(int64_t position) const {
        return weights == nullptr ? 1.0f : load_float(weights, weights_dtype, position);
    }
};

}  // namespace cuda
}  // namespace embcompress
