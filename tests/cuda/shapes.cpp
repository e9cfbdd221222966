// Prints what csrc/cuda/shapes.h decides, one line of numbers for each line of numbers read.

#include "../../csrc/cuda/shapes.h"

#include <cstdio>
#include <cstring>

using namespace embcompress;
using namespace embcompress::cuda;

namespace {

void print_pool() {
    long columns, lanes, batch, features, length, probes, width, staged, sms;
    if (std::scanf("%ld %ld %ld %ld %ld %ld %ld %ld %ld", &columns, &lanes, &batch, &features,
                   &length, &probes, &width, &staged, &sms) != 9) {
        return;
    }
    const FeatureClass which{static_cast<int>(columns), static_cast<int>(lanes), Kind::kAny, 0};
    const PoolShape shape =
        pool_shape(which, batch, features, length, probes, width, probes * sizeof(BoundProbe),
                   staged, {static_cast<int>(sms), 48 << 10});
    std::printf("%d %d %d %ld %ld %ld %ld %ld %ld\n", shape.tile, shape.bags, shape.threads,
                shape.blocks, shape.chunks, shape.plan_bytes, shape.staged_bytes, shape.group_bytes,
                shape.shared_bytes);
}

void print_plain() {
    long lanes, batch, features, length, width, sms;
    if (std::scanf("%ld %ld %ld %ld %ld %ld", &lanes, &batch, &features, &length, &width, &sms) !=
        6) {
        return;
    }
    const FeatureClass which{4, static_cast<int>(lanes), Kind::kPlain, 1};
    const PoolShape shape =
        plain_shape(which, batch, features, length, width, {static_cast<int>(sms), 48 << 10});
    std::printf("%d %d %ld %ld %ld\n", shape.bags, shape.threads, shape.blocks, shape.chunks,
                shape.shared_bytes);
}

// The kernel, columns, lanes and probes of a lane for a feature of float32 rows.
void print_class() {
    long combine, width, probes;
    if (std::scanf("%ld %ld %ld", &combine, &width, &probes) != 3) return;
    Feature feature{};
    feature.combine = static_cast<Combine>(combine);
    feature.width = width;
    feature.num_probes = probes;
    std::vector<BoundProbe> bound(probes);
    for (BoundProbe& each : bound) {
        long column, row_width, at_once, scaled;
        if (std::scanf("%ld %ld %ld %ld", &column, &row_width, &at_once, &scaled) != 4) return;
        each.store.dtype = Dtype::kFloat32;
        each.store.rows = 10;
        each.column = static_cast<int32_t>(column);
        each.width = static_cast<int32_t>(row_width);
        each.vector_columns = static_cast<int32_t>(at_once);
        each.scale_at = static_cast<int32_t>(scaled);
    }
    const FeatureClass which = classify(feature, bound.data());
    std::printf("%d %d %d %d\n", static_cast<int>(which.kind), which.columns, which.lanes,
                which.probes);
}

void print_lanes() {
    long width, columns, probes;
    if (std::scanf("%ld %ld %ld", &width, &columns, &probes) != 3) return;
    std::printf("%d\n", lanes_for(width, static_cast<int>(columns), probes));
}

void print_levels() {
    long touches;
    if (std::scanf("%ld", &touches) != 1) return;
    for (const int64_t count : reduction_levels(touches)) std::printf("%ld ", count);
    std::printf("\n");
}

void print_keys() {
    long rows, targets;
    if (std::scanf("%ld %ld", &rows, &targets) != 2) return;
    const KeyShape key = key_shape(std::vector<Target>(targets, Target{{}, {}, {}, rows, 1, 0, 0}));
    std::printf("%d %d\n", key.row_bits, key.bits);
}

// Begin and size of every array, as far as this pass has them, and the size of all.
void print_workspace() {
    long ids, uses, rows, width, compact, sorted, scalars;
    if (std::scanf("%ld %ld %ld %ld %ld %ld %ld", &ids, &uses, &rows, &width, &compact, &sorted,
                   &scalars) != 7) {
        return;
    }
    const std::vector<Target> targets(2, Target{{}, {}, {}, rows, width, 0, 0});
    const BackwardOptions options{compact != 0, sorted != 0, scalars != 0};
    const BackwardLayout layout = backward_layout(targets, ids, uses, options, 1000);
    const int64_t n = layout.num_touches;
    const std::vector<int64_t> levels = reduction_levels(n);
    std::vector<int64_t> pairs{layout.failed,       4,       layout.bags, 4 * ids,
                               layout.coefficients, 4 * ids, layout.keys, 8 * n,
                               layout.touches,      4 * n};
    const auto add = [&](bool used, int64_t at, int64_t bytes) {
        if (used) pairs.insert(pairs.end(), {at, bytes});
    };
    add(options.scalars, layout.scalars, 4 * n);
    add(options.sorted, layout.sorted_keys, 8 * n);
    add(options.sorted, layout.sorted_touches, 4 * n);
    for (size_t level = 1; options.sorted && level < levels.size() && level < 3; ++level) {
        add(true, layout.partial_keys[level - 1], 8 * levels[level]);
        add(true, layout.partial_values[level - 1], 4 * levels[level] * layout.stride);
    }
    add(options.sorted, layout.scratch, 1000);
    add(options.compact, layout.flags, 4 * n);
    add(options.compact, layout.unique_keys, 8 * layout.most_segments);
    add(options.compact, layout.num_segments, 8);
    add(options.compact, layout.bounds, 24);
    add(options.compact, layout.values, 4 * layout.most_segments * layout.stride);
    std::printf("%ld %ld %ld", layout.size, layout.stride, layout.most_segments);
    for (const int64_t number : pairs) std::printf(" %ld", number);
    std::printf("\n");
}

}  // namespace

int main() {
    char what[16];
    while (std::scanf("%15s", what) == 1) {
        if (std::strcmp(what, "pool") == 0) print_pool();
        if (std::strcmp(what, "plain") == 0) print_plain();
        if (std::strcmp(what, "class") == 0) print_class();
        if (std::strcmp(what, "lanes") == 0) print_lanes();
        if (std::strcmp(what, "levels") == 0) print_levels();
        if (std::strcmp(what, "keys") == 0) print_keys();
        if (std::strcmp(what, "workspace") == 0) print_workspace();
    }
}
