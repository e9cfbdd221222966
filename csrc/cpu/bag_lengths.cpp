// How many ids bags have, read off their offsets in one pass that compilers vectorize.

#include <algorithm>

#include "lookup.h"
#include "vectors.h"

namespace embcompress {
namespace {

template <typename Id>
EMBCOMPRESS_INLINE Lengths lengths_between(const void* offsets, int64_t count, int64_t num_ids) {
    const Id* ends = static_cast<const Id*>(offsets);
    int64_t shortest = num_ids, longest = 0;
    for (int64_t i = 1; i < count; ++i) {
        // Damaged offsets may be any numbers: their difference wraps.
        const int64_t length = static_cast<int64_t>(static_cast<uint64_t>(ends[i]) -
                                                    static_cast<uint64_t>(ends[i - 1]));
        shortest = std::min(shortest, length);
        longest = std::max(longest, length);
    }
    return {shortest, longest};
}

EMBCOMPRESS_CLONES Lengths lengths_of_64(const void* offsets, int64_t count, int64_t num_ids) {
    return lengths_between<int64_t>(offsets, count, num_ids);
}

EMBCOMPRESS_CLONES Lengths lengths_of_32(const void* offsets, int64_t count, int64_t num_ids) {
    return lengths_between<int32_t>(offsets, count, num_ids);
}

}  // namespace

Lengths bag_lengths(const Lookup& lookup) {
    Lengths lengths = lookup.ids_are_32_bit
                          ? lengths_of_32(lookup.offsets, lookup.num_offsets, lookup.num_ids)
                          : lengths_of_64(lookup.offsets, lookup.num_offsets, lookup.num_ids);
    const int64_t bags = lookup.header.num_features * lookup.batch;
    if (bags > 0 && lookup.num_offsets == bags) {  // the end of the last one was left out
        const int64_t last = lookup.num_ids - lookup.offset(bags - 1);
        lengths.shortest = std::min(lengths.shortest, last);
        lengths.longest = std::max(lengths.longest, last);
    }
    return lengths;
}

}  // namespace embcompress
