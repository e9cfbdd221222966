// A sketch of which ids have the largest scores: slots in buckets, each with an id and its score.

#pragma once

#include <cstdint>

namespace embcompress {

struct HotSketch {
    int64_t* ids;  // (buckets, width); -1: an empty slot
    float* scores;
    int64_t buckets;
    int64_t width;
    int64_t kept;  // the first slots of a bucket, whose ids none takes the place of here
    uint64_t key;  // of the hash that gives an id's bucket
};

// Adds amounts to the scores of distinct ids, one after another. An id that has no slot takes an
// empty one of its bucket, or that of the smallest score, and adds to that score.
void add_to_sketch(const HotSketch& sketch, const int64_t* ids, const float* amounts,
                   int64_t count);

}  // namespace embcompress
