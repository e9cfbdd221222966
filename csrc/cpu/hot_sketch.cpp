#include "hot_sketch.h"

#include "../plan.h"

namespace embcompress {
namespace {

// The slot of a bucket that an id adds to: its own, else the first empty one, else the first of
// those with the smallest score.
int64_t slot_for(const HotSketch& sketch, int64_t first, int64_t id) {
    const int64_t end = first + sketch.width;
    for (int64_t slot = first; slot < end; ++slot) {
        if (sketch.ids[slot] == id) return slot;
    }
    int64_t weakest = first + sketch.kept;
    for (int64_t slot = weakest; slot < end; ++slot) {
        if (sketch.ids[slot] < 0) return slot;
        if (sketch.scores[slot] < sketch.scores[weakest]) weakest = slot;
    }
    return weakest;
}

}  // namespace

void add_to_sketch(const HotSketch& sketch, const int64_t* ids, const float* amounts,
                   int64_t count) {
    const uint64_t buckets = static_cast<uint64_t>(sketch.buckets);
    for (int64_t i = 0; i < count; ++i) {
        if (!(amounts[i] > 0.0f)) continue;
        const int64_t slot =
            slot_for(sketch, hash_bucket(ids[i], sketch.key, buckets) * sketch.width, ids[i]);
        sketch.ids[slot] = ids[i];
        sketch.scores[slot] += amounts[i];
    }
}

}  // namespace embcompress
