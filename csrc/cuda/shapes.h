// Host logic of the CUDA kernels: who does what, and how much memory that takes. No CUDA in here.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "device_plan.h"

namespace embcompress {
namespace cuda {

struct DeviceLimits {
    int multiprocessors;
    int64_t shared_bytes;  // that a block may have without asking
};

// Blocks of a grid: enough to fill the device a few times over, each then strides over the work.
constexpr int64_t kBlocksPerMultiprocessor = 8;
// Shared memory for hot stores; the rest of the 48 KiB is for rows found and the plan.
constexpr int64_t kStagedBytes = 24 << 10;
constexpr int64_t kPlanBytes = 7 << 10;
constexpr int64_t kTileBytes = 16 << 10;
constexpr int64_t kMostBags = 8;  // that a group pools one after the other
constexpr int64_t kSmallestTile = 4;
// What finding the rows of a tile of ids takes, in rows that are read meanwhile.
constexpr int64_t kRowsOfTile = 4;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t align_up(int64_t bytes, int64_t unit) { return divide_up(bytes, unit) * unit; }

// Lanes of a warp that share one row: a power of two, so that narrow rows leave none idle. With
// many probes a warp is a few groups at most, whose rows fit shared memory.
constexpr int64_t kManyProbes = 8;
inline int lanes_for(int64_t width, int columns, int64_t probes) {
    int lanes = probes > kManyProbes ? 4 : 1;
    while (lanes < 32 && lanes * columns < width) lanes *= 2;
    return lanes;
}

// Which of the forward kernels runs a feature: the one for all, that for a few plain probes which
// all lanes read, or that for plain probes side by side, of which a lane reads its own.
enum class Kind : int { kAny = 0, kPlain = 1, kPlaced = 2 };
constexpr int kMostPlainProbes = 4;
constexpr int kMostPlacedProbes = 2;  // of one lane, and one of a lane of 2 columns
// Ids of one call: their positions, and those a warp further on, fit 32 bits.
constexpr int64_t kMostIds = 0x7FFFFFFF - 64;
// Rows of plain probes are numbered in 32 bits, with one number for "none".
constexpr int64_t kMostPlainRows = 0xFFFFFFFF;

// Blocks of plain features that are on a multiprocessor at once, as registers allow.
constexpr int plain_blocks(bool placed, int probes) {
    return placed ? (probes == 1 ? 3 : 2) : (probes < 4 ? 4 : 3);
}

struct FeatureClass {
    int columns;  // of a lane: 4 floats, 2 of narrow parts, or 8 numbers of 16 bits and less
    int lanes;
    Kind kind;
    int probes;  // that a lane reads, of plain ones

    bool operator==(const FeatureClass& other) const {
        return columns == other.columns && lanes == other.lanes && kind == other.kind &&
               probes == other.probes;
    }
};

inline bool is_plain(const BoundProbe& bound) {
    const BoundCode* code = bound.code();
    return bound.store.dtype == Dtype::kFloat32 && bound.steps_at == 0 && bound.scale_at == 0 &&
           (code == nullptr || code->other_at == 0) && bound.store.rows < kMostPlainRows;
}

// The most probes that reach one column, which those of one lane are where the ends of probes are
// ends of lanes.
inline int64_t probes_of_a_lane(const Feature& feature, const BoundProbe* bound) {
    int64_t most = 0;
    for (int64_t t = 0; t < feature.num_probes; ++t) {
        int64_t reaching = 0;  // the first column of probe t
        for (int64_t u = 0; u < feature.num_probes; ++u) {
            const int64_t ahead = bound[t].column - bound[u].column;
            reaching += ahead >= 0 && ahead < bound[u].width;
        }
        most = std::max(most, reaching);
    }
    return most;
}

inline FeatureClass classify(const Feature& feature, const BoundProbe* bound) {
    bool narrow = true, plain = feature.num_probes > 0;
    int columns = 4;  // of a lane that reads floats
    for (int64_t t = 0; t < feature.num_probes; ++t) {
        narrow &= bound[t].store.dtype != Dtype::kFloat32 && bound[t].vector_columns == 8;
        plain &= is_plain(bound[t]);
        columns = std::min(columns, bound[t].vector_columns);
    }
    const bool placed = feature.combine == Combine::kPlace && feature.num_probes > 1;
    if (plain && placed && columns > 1) {
        const int probes = static_cast<int>(probes_of_a_lane(feature, bound));
        if (probes <= (columns == 4 ? kMostPlacedProbes : 1)) {
            return {columns, lanes_for(feature.width, columns, 1), Kind::kPlaced, probes};
        }
    }
    if (plain && !placed && columns == 4 && feature.num_probes <= kMostPlainProbes) {
        const int probes = static_cast<int>(feature.num_probes);
        return {columns, lanes_for(feature.width, columns, 1), Kind::kPlain, probes};
    }
    columns = narrow ? 8 : 4;
    return {columns, lanes_for(feature.width, columns, feature.num_probes), Kind::kAny, 0};
}

// Bytes of shared memory that a group of lanes needs for the rows that it found.
inline int64_t tile_size(int lanes) { return std::max<int64_t>(lanes, kSmallestTile); }
inline int64_t pool_group_bytes(int64_t tile, int64_t probes) {
    return tile * (probes * 12 + 4 + 4 + 4 + 8);
}

// Threads of a block whose groups need so many bytes each: one warp at least.
inline int threads_for(int lanes, int64_t group_bytes) {
    int threads = kThreads;
    while (threads > 32 && threads / lanes * group_bytes > kTileBytes) threads /= 2;
    return threads;
}

// Blocks for a number of items, each of which one of a block's groups takes.
inline int64_t grid_blocks(int64_t items, int64_t groups, const DeviceLimits& device) {
    return std::max<int64_t>(
        1, std::min(divide_up(items, groups), device.multiprocessors * kBlocksPerMultiprocessor));
}

struct PoolShape {
    int tile;
    int bags;  // that a group pools one after the other
    int threads;
    int64_t blocks;
    int64_t chunks;
    int64_t plan_bytes;  // of the feature's records in shared memory; 0: they stay where they are
    int64_t staged_bytes;
    int64_t group_bytes;  // of what a group knows of its tile of ids
    int64_t shared_bytes;
};

// The launch for the features of one class; `probes`, `width` and bytes are the most that one of
// them has.
inline PoolShape pool_shape(const FeatureClass& which, int64_t batch, int64_t num_features,
                            int64_t ids_per_bag, int64_t probes, int64_t width,
                            int64_t record_bytes, int64_t staged_bytes,
                            const DeviceLimits& device) {
    PoolShape shape{};
    shape.tile = static_cast<int>(tile_size(which.lanes));
    shape.group_bytes = pool_group_bytes(shape.tile, probes);
    shape.threads = threads_for(which.lanes, shape.group_bytes);
    const int64_t groups = shape.threads / which.lanes;
    const int64_t most_blocks = device.multiprocessors * kBlocksPerMultiprocessor;
    // Short bags are pooled several at a time, so that the lanes find the rows of many ids at once,
    // but only where enough groups stay to fill the device.
    const int64_t filled = std::max<int64_t>(1, batch * num_features / (most_blocks * groups));
    const int64_t wanted = divide_up(shape.tile, std::max<int64_t>(1, ids_per_bag));
    shape.bags = static_cast<int>(std::min({kMostBags, filled, wanted, int64_t{shape.tile}}));
    const int64_t runs = divide_up(batch, shape.bags);
    shape.chunks = divide_up(width, which.lanes * which.columns);
    const int64_t share = std::max<int64_t>(1, most_blocks / (num_features * shape.chunks));
    shape.blocks = std::max<int64_t>(1, std::min(divide_up(runs, groups), share));
    shape.plan_bytes = record_bytes <= kPlanBytes ? align_up(record_bytes, 16) : 0;
    shape.shared_bytes = shape.plan_bytes + align_up(groups * shape.group_bytes, 16);
    // Copying a store pays where a block reads it several times over.
    const int64_t reads =
        divide_up(runs, groups * shape.blocks) * groups * shape.bags * ids_per_bag * width * 4;
    const bool fits = shape.shared_bytes + staged_bytes <= device.shared_bytes;
    if (shape.plan_bytes > 0 && fits && reads >= 4 * staged_bytes) {
        shape.staged_bytes = staged_bytes;
        shape.shared_bytes += staged_bytes;
    }
    return shape;
}

// Bags that a group pools one after the other, a lane's number of them at most: as the last tile of
// a run is seldom full, and the last round of groups on the device is not either, the number for
// which rounds times the time of a run are least.
inline int plain_bags(int lanes, int64_t bags, int64_t ids_per_bag, int64_t groups_at_once) {
    int64_t best = 1, least = 0;
    for (int64_t run = 1; run <= std::min<int64_t>(kMostBags, lanes); ++run) {
        const int64_t rounds = divide_up(divide_up(bags, run), groups_at_once);
        const int64_t ids = run * ids_per_bag;
        const int64_t time = rounds * (ids + kRowsOfTile * divide_up(ids, lanes));
        if (run == 1 || time < least) best = run, least = time;
    }
    return static_cast<int>(best);
}

// The launch for plain or placed features: no shared memory, and a block for every few bags, which
// the device hands out as others end.
inline PoolShape plain_shape(const FeatureClass& which, int64_t batch, int64_t num_features,
                             int64_t ids_per_bag, int64_t width, const DeviceLimits& device) {
    PoolShape shape{};
    shape.threads = kThreads;
    shape.chunks = divide_up(width, which.lanes * which.columns);
    const int64_t groups = shape.threads / which.lanes;
    const int blocks = plain_blocks(which.kind == Kind::kPlaced, which.probes);
    const int64_t at_once = device.multiprocessors * blocks * groups;
    shape.bags = plain_bags(which.lanes, batch * num_features * shape.chunks,
                            std::max<int64_t>(1, ids_per_bag), at_once);
    shape.blocks = std::max<int64_t>(1, divide_up(divide_up(batch, shape.bags), groups));
    return shape;
}

// Decides which stores of a feature are put in shared memory; returns their bytes.
inline int64_t stage_stores(const Feature& feature, BoundProbe* bound) {
    int64_t used = 0;
    for (int64_t t = 0; t < feature.num_probes; ++t) {
        bound[t].staged_at = -1;
        for (int64_t u = 0; u < t; ++u) {
            // Slices of one tensor may begin at one address, but differ in length.
            const StoreView &before = bound[u].store, &store = bound[t].store;
            if (before.data == store.data && before.bytes == store.bytes) {
                bound[t].staged_at = bound[u].staged_at;
            }
        }
        const int64_t bytes = align_up(bound[t].store.bytes, 16);
        if (bound[t].staged_at >= 0 || bytes == 0 || used + bytes > kStagedBytes) continue;
        bound[t].staged_at = static_cast<int32_t>(used);
        used += bytes;
    }
    return used;
}

// ----------------------------------------------------------------------------------- backward

// Touches that one group adds up: fixed, so that sums do not depend on the device.
constexpr int64_t kTouchesPerChunk = 32;
constexpr int64_t kMostTouches = 0xFFFFFFFFLL;

// Bytes of shared memory of what a group knows of its tile of touches.
EMBCOMPRESS_INLINE int64_t touch_group_bytes(int64_t tile, int64_t probes) {
    return tile * (8 + 8 + 4 + 4 + 4 + probes * 12);
}

// How the gradients of rows are added up: chunks of sorted touches leave what may go on in another
// chunk, two partial rows each, which are chunks of the next level, until one chunk is left.
inline std::vector<int64_t> reduction_levels(int64_t touches) {
    std::vector<int64_t> counts{touches};
    while (counts.back() > kTouchesPerChunk) {
        counts.push_back(2 * divide_up(counts.back(), kTouchesPerChunk));
    }
    return counts;
}

inline int bits_of(int64_t value) {
    int bits = 0;
    while (bits < 63 && (int64_t{1} << bits) <= value) ++bits;
    return bits;
}

// Keys of touches: the target above, its row below. One target more means "none".
struct KeyShape {
    int row_bits;
    int bits;
};

inline KeyShape key_shape(const std::vector<Target>& targets) {
    int64_t most = 1;
    for (const Target& target : targets) most = std::max(most, target.rows - 1);
    const int row_bits = bits_of(most);
    return {row_bits, row_bits + bits_of(static_cast<int64_t>(targets.size()))};
}

// Bytes of the arrays of a backward pass in one piece of memory.
class Workspace {
  public:
    int64_t take(int64_t bytes) {
        const int64_t at = size_;
        size_ += align_up(std::max<int64_t>(bytes, 1), 256);
        return at;
    }
    int64_t size() const { return size_; }

  private:
    int64_t size_ = 0;
};

struct BackwardOptions {
    bool compact;  // touched rows side by side, instead of rows of the whole store
    bool sorted;   // false: atomics
    bool scalars;  // some touch is a dot product: a learned scale's, or a shared step's
};

struct BackwardLayout {
    int64_t failed;        // int: an id or offset was wrong
    int64_t bags;          // uint32 of each id
    int64_t coefficients;  // float of each id
    int64_t scalars;       // float of each touch
    int64_t keys;          // int64 of each touch
    int64_t touches;       // uint32 of each touch: where it was
    int64_t sorted_keys;
    int64_t sorted_touches;
    int64_t flags;  // uint32 of each touch: 1 where a row begins
    int64_t segments;
    int64_t unique_keys;
    int64_t num_segments;  // int64
    int64_t bounds;        // int64 of each target, and one
    int64_t values;        // float rows of the segments
    int64_t partial_keys[2];
    int64_t partial_values[2];
    int64_t scratch;  // of the sort and the scan
    int64_t size;
    int64_t num_touches;
    int64_t most_segments;
    int64_t stride;  // of a row of values
};

inline BackwardLayout backward_layout(const std::vector<Target>& targets, int64_t num_ids,
                                      int64_t uses_per_feature, const BackwardOptions& options,
                                      int64_t scratch_bytes) {
    BackwardLayout layout{};
    int64_t rows = 0, width = 1;
    for (const Target& target : targets) {
        rows += target.rows;
        width = std::max(width, target.width);
    }
    const int64_t touches = layout.num_touches = num_ids * uses_per_feature;
    layout.most_segments = std::min(touches, rows);
    layout.stride = align_up(width, 4);
    Workspace space;
    layout.failed = space.take(4);
    layout.bags = space.take(num_ids * 4);
    layout.coefficients = space.take(num_ids * 4);
    layout.scalars = space.take(options.scalars ? touches * 4 : 0);
    layout.keys = space.take(touches * 8);
    layout.touches = space.take(touches * 4);
    if (options.sorted) {
        layout.sorted_keys = space.take(touches * 8);
        layout.sorted_touches = space.take(touches * 4);
        const std::vector<int64_t> levels = reduction_levels(touches);
        for (size_t level = 1; level < levels.size() && level < 3; ++level) {
            layout.partial_keys[level - 1] = space.take(levels[level] * 8);
            layout.partial_values[level - 1] = space.take(levels[level] * layout.stride * 4);
        }
        layout.scratch = space.take(scratch_bytes);
    }
    if (options.compact) {
        // The keys of touches are not needed once they are sorted: segments take their place.
        layout.segments = layout.keys;
        layout.flags = space.take(touches * 4);
        layout.unique_keys = space.take(layout.most_segments * 8);
        layout.num_segments = space.take(8);
        layout.bounds = space.take((static_cast<int64_t>(targets.size()) + 1) * 8);
        layout.values = space.take(layout.most_segments * layout.stride * 4);
    }
    layout.size = space.size();
    return layout;
}

}  // namespace cuda
}  // namespace embcompress
