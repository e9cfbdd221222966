// Pooling the bags of one feature, before a head.

#pragma once

#include "output.h"
#include "rows.h"

namespace embcompress {

// A bag of more ids than this is cut into pieces of a fixed length, which are pooled in parallel
// and added up in order: the result does not depend on the number of threads.
constexpr int64_t kHugeBag = 16384;

inline bool is_huge(const Lookup& lookup, int64_t bag) {
    return lookup.offset(bag + 1) - lookup.offset(bag) > kHugeBag;
}

// Whether the n bags from `bag` on, the first of which begins at `position`, are of one id each.
EMBCOMPRESS_INLINE bool are_single(const Lookup& lookup, int64_t bag, int64_t position, int n) {
    if (lookup.offsets == nullptr) return true;
    if (lookup.offset(bag) != position || lookup.offset(bag + n) != position + n) return false;
    for (int i = 1; i < n; ++i) {
        if (lookup.offset(bag + i) != position + i) return false;
    }
    return true;
}

// Pools bags [begin, end), but for huge ones, each into the next row of `out`. False for an id
// outside.
bool pool_bags(const Lookup& lookup, RowBlock& rows, int64_t begin, int64_t end,
               const OutputRows& out);

// The same for n bags of one id each, which begin at `position`, in two steps: finds the rows of
// the ids and has the first of them fetched; then, when others are under way, writes the vectors.
bool find_block(RowBlock& rows, int64_t position, int n);
void write_block(const Lookup& lookup, RowBlock& rows, int64_t position, int n,
                 const OutputRows& out);

// The same for one huge bag, by so many threads.
bool pool_huge_bag(const Lookup& lookup, const Feature& feature, int64_t bag, float* out,
                   int num_threads);

}  // namespace embcompress
