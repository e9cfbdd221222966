// Backward, second half: the gradients of rows, added up over touches that are sorted by row.
//
// A group of lanes takes a chunk of touches. A row whose touches all lie in the chunk is complete and
// goes to the sink; a row that goes on in another chunk leaves a partial sum. The partial sums, two of
// a chunk at most, are the touches of the next level. Chunks have a fixed size, so the order of every
// sum is fixed by the batch alone.

#include "update.cuh"

namespace embcompress {
namespace cuda {
namespace {

constexpr int kColumns = 4;  // of a lane
constexpr int kAtOnce = 4;   // touches whose loads are under way together
constexpr int64_t kNone = -1;

// One level: touches, or the partial sums of the level before.
struct Level {
    const int64_t* keys;
    const float* values;  // nullptr: of touches
    int64_t* partial_keys;
    float* partial_values;
    int64_t count;
};

struct ReduceArguments {
    Level level;
    int32_t lanes;
    int32_t tile;
};

// What a group knows of a tile of touches, in shared memory.
struct TouchTile {
    int64_t* keys;
    int64_t* gradients;  // where the touch's part of the output's gradient begins
    int64_t* rows;       // probe by probe, where the gradient depends on them
    float* factors;      // coefficient, times the scale of the touch's own probe
    float* scales;       // probe by probe
    uint32_t* uses;
    uint32_t* touches;
    int size;

    __device__ TouchTile(unsigned char* memory, int size_, int probes) : size(size_) {
        keys = reinterpret_cast<int64_t*>(memory);
        gradients = keys + size;
        rows = gradients + size;
        factors = reinterpret_cast<float*>(rows + size * probes);
        scales = factors + size;
        uses = reinterpret_cast<uint32_t*>(scales + size * probes);
        touches = uses + size;
    }
};

// Reads touch number i of the tile that begins at `position`.
__device__ void read_touch(const BackwardArguments& arguments, const PlanView& plan, int64_t key,
                           uint32_t touch, const TouchTile& tile, int i) {
    const Inputs& inputs = arguments.inputs;
    const Arrays arrays(arguments.workspace, arguments.layout);
    const int64_t position = touch % inputs.num_ids, j = touch / inputs.num_ids;
    const int64_t bag = arrays.bags[position], number = bag / inputs.batch;
    const Feature& feature = plan.feature(number);
    const BoundProbe* bound = plan.probes(feature);
    const int64_t use_number = number * plan.layout->uses_per_feature + j;
    const Use& use = plan.use(use_number);
    const Probe& probe = bound[use.probe].probe;
    const bool multiply = feature.combine == Combine::kMul;
    const bool concat = feature.combine == Combine::kConcat;
    bool inside;
    const int64_t id = checked_id(inputs, feature, position, &inside);
    if (id < 0) return;  // changed since: the host hears of it
    for (int t = 0; t < feature.num_probes; ++t) {
        if (t != use.probe && !multiply) continue;
        const int64_t row = probe_row(bound[t], id);
        tile.rows[t * tile.size + i] = row;
        tile.scales[t * tile.size + i] = row < 0 ? 0.0f : probe_scale(bound[t], id);
    }
    tile.factors[i] =
        arrays.coefficients[position] * tile.scales[use.probe * tile.size + i];
    tile.gradients[i] = bag % inputs.batch * inputs.num_columns + feature.out_column +
                        (concat ? probe.column : 0);
    tile.uses[i] = static_cast<uint32_t>(use_number);
    tile.touches[i] = touch;
    tile.keys[i] = key;
}

// Gradients of C columns of U touches: of the values that the probe's row gave.
template <int C, int U>
EMBCOMPRESS_DEVICE void touch_values(const BackwardArguments& arguments, const PlanView& plan,
                                     const TouchTile& tile, int i, int64_t column,
                                     float (&values)[U][C]) {
    const int uses = plan.layout->uses_per_feature;
    // Loads first: none of them waits for another.
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int c = 0; c < C; ++c) values[u][c] = 0.0f;
        if (tile.keys[i + u] < 0) continue;
        const Feature& feature = plan.feature(tile.uses[i + u] / uses);
        const Use& use = plan.use(tile.uses[i + u]);
        const BoundProbe& bound = plan.probes(feature)[use.probe];
        if (is_scalar(use, bound)) continue;
        const float* gradient = arguments.gradient + tile.gradients[i + u];
        const bool aligned = is_aligned(gradient, 0);
        load_some(gradient, column, bound.probe.width, aligned, values[u]);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
        if (tile.keys[i + u] < 0) continue;
        const Feature& feature = plan.feature(tile.uses[i + u] / uses);
        const Use& use = plan.use(tile.uses[i + u]);
        const BoundProbe* bound = plan.probes(feature);
        const BoundProbe& own = bound[use.probe];
        if (is_scalar(use, own)) {
            const int64_t target = use.role == Role::kScale ? own.probe.scale.column : 0;
            const Arrays arrays(arguments.workspace, arguments.layout);
            const float scalar = arrays.scalars[tile.touches[i + u]];
#pragma unroll
            for (int c = 0; c < C; ++c) values[u][c] = column + c == target ? scalar : 0.0f;
            continue;
        }
#pragma unroll
        for (int c = 0; c < C; ++c) values[u][c] *= tile.factors[i + u];
        if (feature.combine == Combine::kMul) {
            for (int t = 0; t < feature.num_probes; ++t) {
                if (t == use.probe) continue;
                float other[1][C];
                load_values<C, 1>(bound[t], tile.rows + t * tile.size + i + u, column, other);
                const float scale = tile.scales[t * tile.size + i + u];
#pragma unroll
                for (int c = 0; c < C; ++c) values[u][c] *= scale * other[0][c];
            }
        }
        if (use.role == Role::kRows && !is_latent(own)) continue;
        const int64_t row = tile.rows[use.probe * tile.size + i + u];
#pragma unroll
        for (int c = 0; c < C; ++c) {
            if (column + c >= own.probe.width) continue;
            if (use.role == Role::kRows) {
                const float latent = stored_number(own, row, column + c);
                if (!latent_of(own, row, column + c, latent).inside) values[u][c] = 0.0f;
            } else {
                values[u][c] *= step_factor(own, use.role, row, column + c);
            }
        }
    }
}

// Hands over the complete gradient of a row.
template <int C>
EMBCOMPRESS_DEVICE void write_row(const BackwardArguments& arguments, const PlanView& plan,
                                  const Group& group, int64_t key, int64_t column,
                                  const float (&sum)[C]) {
    if (arguments.sink == SinkKind::kCompact) {
        const Arrays arrays(arguments.workspace, arguments.layout);
        const int64_t stride = arguments.layout.stride;
        store_some(arrays.values + key * stride, column, stride, true, sum);
        return;
    }
    const Target& target = plan.target(arguments.target_of(key));
    const int64_t row = arguments.row_in(key);
    float* to = target.data + row * target.width;
    if (arguments.sink == SinkKind::kDense) {
        store_some(to, column, target.width, is_aligned(target.data, target.width), sum);
    } else if (arguments.sink == SinkKind::kAtomic) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
            if (column + c < target.width) atomicAdd(to + column + c, sum[c]);
        }
    } else {
        const OptimizerSettings& optimizer = arguments.optimizer;
        const float squares = sum_of_squares(optimizer, target, row, column, sum);
        const float state = advance_state(optimizer, group, target, row, squares);
        update_columns(optimizer, target, row, column, sum, state);
    }
}

// Adds up one chunk.
template <bool kTouches>
EMBCOMPRESS_DEVICE void reduce_chunk(const BackwardArguments& arguments, const Level& level,
                                     const PlanView& plan, const Group& group,
                                     const TouchTile& tile, int64_t chunk, int64_t column) {
    constexpr int C = kColumns;
    const int64_t stride = arguments.layout.stride;
    const int64_t begin = chunk * kTouchesPerChunk;
    const int64_t end =
        begin + kTouchesPerChunk < level.count ? begin + kTouchesPerChunk : level.count;
    const bool atomic = arguments.sink == SinkKind::kAtomic;
    const int64_t before = begin > 0 && !atomic ? level.keys[begin - 1] : kNone;
    const int64_t after = end < level.count && !atomic ? level.keys[end] : kNone;
    const Arrays arrays(arguments.workspace, arguments.layout);
    int64_t key = kNone;
    bool is_first = true;
    float sum[C];
    int64_t left = kNone, right = kNone;  // keys of the partial sums
    const auto finish_row = [&](bool goes_on) {
        if (key != kNone) {
            const bool began_before = is_first && key == before;
            if (began_before || goes_on) {
                const int slot = began_before ? 0 : 1;
                if (began_before) left = key;
                if (goes_on) right = key;
                store_some(level.partial_values + (2 * chunk + slot) * stride, column, stride, true,
                           sum);
                if (began_before && goes_on) {
                    // The whole chunk is of one row: it must not seem to end between the slots.
                    const float zeros[C] = {};
                    store_some(level.partial_values + (2 * chunk + 1) * stride, column, stride,
                               true, zeros);
                }
            } else {
                write_row(arguments, plan, group, key, column, sum);
            }
            is_first = false;
        }
    };
    for (int64_t position = begin; position < end; position += tile.size) {
        for (int i = group.lane; i < tile.size; i += group.lanes) {
            tile.keys[i] = kNone;
            if (position + i >= end) continue;
            const int64_t each = level.keys[position + i];
            if (kTouches) {
                const int64_t none = int64_t{plan.layout->num_targets} << arguments.key.row_bits;
                const bool compact = arguments.sink == SinkKind::kCompact;
                if (compact ? each < 0 : each >= none) continue;
                const uint32_t touch = atomic ? arrays.touches[position + i]
                                              : arrays.sorted_touches[position + i];
                read_touch(arguments, plan, each, touch, tile, i);
            } else {
                tile.keys[i] = each;
            }
        }
        group.sync();
        for (int i = 0; i < tile.size && position + i < end; i += kAtOnce) {
            float values[kAtOnce][C];
            if (kTouches) {
                touch_values<C, kAtOnce>(arguments, plan, tile, i, column, values);
            } else {
#pragma unroll
                for (int u = 0; u < kAtOnce; ++u) {
#pragma unroll
                    for (int c = 0; c < C; ++c) values[u][c] = 0.0f;
                    if (tile.keys[i + u] == kNone) continue;
                    load_some(level.values + (position + i + u) * stride, column, stride, true,
                              values[u]);
                }
            }
#pragma unroll
            for (int u = 0; u < kAtOnce; ++u) {
                if (position + i + u >= end) continue;
                const int64_t next = tile.keys[i + u];
                if (next != key || atomic) {
                    finish_row(false);
                    key = next;
#pragma unroll
                    for (int c = 0; c < C; ++c) sum[c] = 0.0f;
                }
#pragma unroll
                for (int c = 0; c < C; ++c) sum[c] += values[u][c];
            }
        }
        group.sync();
    }
    finish_row(key == after);
    if (group.lane == 0 && level.partial_keys != nullptr && blockIdx.z == 0) {
        level.partial_keys[2 * chunk] = left;
        level.partial_keys[2 * chunk + 1] = right;
    }
}

template <bool kTouches>
__global__ void __launch_bounds__(kThreads, 2)
    reduce_kernel(const __grid_constant__ PlanArgument argument,
                  const __grid_constant__ BackwardArguments arguments,
                  const __grid_constant__ ReduceArguments reduce) {
    EMBCOMPRESS_SHARED(shared);
    const PlanView plan(argument);
    const Group group(reduce.lanes);
    if (*Arrays(arguments.workspace, arguments.layout).failed) return;
    const int probes = kTouches ? argument.layout.most_probes : 0;
    const TouchTile tile(shared + group.number * touch_group_bytes(reduce.tile, probes),
                         reduce.tile, probes);
    const int64_t column =
        (static_cast<int64_t>(blockIdx.z) * group.lanes + group.lane) * kColumns;
    const int64_t groups = blockDim.x / group.lanes;
    const int64_t chunks = (reduce.level.count + kTouchesPerChunk - 1) / kTouchesPerChunk;
    for (int64_t chunk = blockIdx.x * groups + group.number; chunk < chunks;
         chunk += gridDim.x * groups) {
        reduce_chunk<kTouches>(arguments, reduce.level, plan, group, tile, chunk, column);
    }
}

// 1 where the touches of another row begin.
__global__ void __launch_bounds__(kThreads)
    heads_kernel(const __grid_constant__ BackwardArguments arguments, int64_t none) {
    const Arrays arrays(arguments.workspace, arguments.layout);
    const int64_t count = arguments.layout.num_touches, step = int64_t{gridDim.x} * blockDim.x;
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
        const int64_t key = arrays.sorted_keys[i];
        arrays.flags[i] = key < none && (i == 0 || arrays.sorted_keys[i - 1] != key) ? 1 : 0;
    }
}

// Numbers the rows that are touched, from the running sum of the heads.
__global__ void __launch_bounds__(kThreads)
    segments_kernel(const __grid_constant__ BackwardArguments arguments, int64_t none) {
    const Arrays arrays(arguments.workspace, arguments.layout);
    const int64_t count = arguments.layout.num_touches, step = int64_t{gridDim.x} * blockDim.x;
    if (*arrays.failed) return;
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
        const int64_t key = arrays.sorted_keys[i], segment = int64_t{arrays.flags[i]} - 1;
        arrays.segments[i] = key < none ? segment : kNone;
        if (key < none && (i == 0 || arrays.sorted_keys[i - 1] != key)) {
            arrays.unique_keys[segment] = key;
        }
        if (i + 1 == count) *arrays.num_segments = segment + 1;
    }
}

// A group of lanes for each touched row.
__global__ void __launch_bounds__(kThreads)
    update_kernel(const __grid_constant__ PlanArgument argument,
                  const __grid_constant__ BackwardArguments arguments, int lanes, int round) {
    const PlanView plan(argument);
    const Group group(lanes);
    const Arrays arrays(arguments.workspace, arguments.layout);
    const OptimizerSettings& optimizer = arguments.optimizer;
    const int64_t groups = blockDim.x / lanes;
    if (*arrays.failed) return;
    for (int64_t segment = blockIdx.x * groups + group.number; segment < *arrays.num_segments;
         segment += gridDim.x * groups) {
        const int64_t key = arrays.unique_keys[segment], row = arguments.row_in(key);
        const Target& target = plan.target(arguments.target_of(key));
        if (target.round != round) continue;
        const float* values = arrays.values + segment * arguments.layout.stride;
        float gradient[kColumns];
        float squares = 0.0f;
        for (int64_t c = group.lane * kColumns; c < target.width; c += lanes * kColumns) {
            load_floats(values + c, gradient);
            squares += sum_of_squares(optimizer, target, row, c, gradient);
        }
        const float state = advance_state(optimizer, group, target, row, squares);
        for (int64_t c = group.lane * kColumns; c < target.width; c += lanes * kColumns) {
            load_floats(values + c, gradient);
            update_columns(optimizer, target, row, c, gradient, state);
        }
    }
}

// bounds[k]: the first touched row of target k among all.
__global__ void bounds_kernel(const __grid_constant__ BackwardArguments arguments,
                              int num_targets) {
    const Arrays arrays(arguments.workspace, arguments.layout);
    const int64_t count = *arrays.failed ? 0 : *arrays.num_segments;
    for (int k = static_cast<int>(threadIdx.x); k <= num_targets; k += blockDim.x) {
        const int64_t key = static_cast<int64_t>(k) << arguments.key.row_bits;
        int64_t low = 0, high = count;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (arrays.unique_keys[middle] < key) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        arrays.bounds[k] = low;
    }
}

__global__ void __launch_bounds__(kThreads)
    copy_kernel(const __grid_constant__ BackwardArguments arguments, int64_t begin, int64_t count,
                int64_t width, int64_t* rows, float* values) {
    const Arrays arrays(arguments.workspace, arguments.layout);
    const int64_t step = int64_t{gridDim.x} * blockDim.x;
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count * width; i += step) {
        const int64_t number = i / width, column = i % width;
        values[i] = arrays.values[(begin + number) * arguments.layout.stride + column];
        if (column == 0) rows[number] = arguments.row_in(arrays.unique_keys[begin + number]);
    }
}

LaunchShape flat_shape(int64_t items, const DeviceLimits& device) {
    LaunchShape shape;
    shape.blocks = grid_blocks(items, shape.threads, device);
    return shape;
}

template <bool kTouches>
void launch_reduce(const Backward& backward, const Level& level, const DeviceLimits& device,
                   cudaStream_t stream) {
    ReduceArguments reduce{};
    reduce.level = level;
    reduce.lanes = lanes_for(backward.widest, kColumns);
    reduce.tile = static_cast<int32_t>(tile_size(reduce.lanes));
    const int64_t bytes =
        touch_group_bytes(reduce.tile, kTouches ? backward.plan.layout.most_probes : 0);
    LaunchShape shape;
    shape.threads = threads_for(reduce.lanes, bytes);
    const int64_t groups = shape.threads / reduce.lanes;
    shape.blocks = grid_blocks(divide_up(level.count, kTouchesPerChunk), groups, device);
    shape.chunks = divide_up(backward.widest, reduce.lanes * kColumns);
    shape.shared_bytes = groups * bytes;
    launch("reduce_kernel", reduce_kernel<kTouches>, shape, stream, backward.plan,
           BackwardArguments(backward), reduce);
}

// Numbers the touched rows, so that their gradients lie side by side.
void number_segments(const Backward& backward, const DeviceLimits& device, cudaStream_t stream) {
    const BackwardArguments arguments(backward);
    const Arrays arrays(backward.workspace, backward.layout);
    const int64_t count = backward.layout.num_touches;
    const int64_t none = int64_t{backward.plan.layout.num_targets} << backward.key.row_bits;
    const LaunchShape shape = flat_shape(count, device);
    launch("heads_kernel", heads_kernel, shape, stream, arguments, none);
    running_sum(backward.workspace + backward.layout.scratch,
                scratch_bytes(count, backward.key.bits), arrays.flags, count, stream);
    launch("segments_kernel", segments_kernel, shape, stream, arguments, none);
}

}  // namespace

void add_gradients(const Backward& backward, const DeviceLimits& device, cudaStream_t stream) {
    const BackwardLayout& layout = backward.layout;
    const Arrays arrays(backward.workspace, layout);
    const int64_t count = layout.num_touches;
    const bool compact = backward.sink == SinkKind::kCompact;
    if (compact) fill_zero(arrays.num_segments, sizeof(int64_t), stream);
    if (count == 0) return;
    if (backward.sink == SinkKind::kAtomic) {
        const Level level{arrays.keys, nullptr, nullptr, nullptr, count};
        launch_reduce<true>(backward, level, device, stream);
        return;
    }
    sort_touches(backward.workspace + layout.scratch, scratch_bytes(count, backward.key.bits),
                 arrays.keys, arrays.sorted_keys, arrays.touches, arrays.sorted_touches, count,
                 backward.key.bits, stream);
    if (compact) number_segments(backward, device, stream);
    const std::vector<int64_t> levels = reduction_levels(count);
    Level level{compact ? arrays.segments : arrays.sorted_keys, nullptr, nullptr, nullptr, count};
    for (size_t number = 0; number < levels.size(); ++number) {
        level.count = levels[number];
        level.partial_keys = nullptr;
        level.partial_values = nullptr;
        if (number + 1 < levels.size()) {
            unsigned char* keys = backward.workspace + layout.partial_keys[number % 2];
            unsigned char* values = backward.workspace + layout.partial_values[number % 2];
            level.partial_keys = reinterpret_cast<int64_t*>(keys);
            level.partial_values = reinterpret_cast<float*>(values);
        }
        if (number == 0) {
            launch_reduce<true>(backward, level, device, stream);
        } else {
            launch_reduce<false>(backward, level, device, stream);
        }
        level.keys = level.partial_keys;
        level.values = level.partial_values;
    }
}

void update_segments(const Backward& backward, const DeviceLimits& device, cudaStream_t stream) {
    if (backward.layout.num_touches == 0) return;
    const int lanes = lanes_for(backward.widest, kColumns);
    LaunchShape shape;
    shape.blocks =
        grid_blocks(backward.layout.most_segments, shape.threads / lanes, device);
    for (int round = 0; round < backward.rounds; ++round) {
        launch("update_kernel", update_kernel, shape, stream, backward.plan,
               BackwardArguments(backward), lanes, round);
    }
}

void count_touched_rows(const Backward& backward, std::vector<int64_t>& bounds,
                        cudaStream_t stream) {
    const int num_targets = backward.plan.layout.num_targets;
    bounds.assign(num_targets + 1, 0);
    LaunchShape shape;
    shape.threads = 32;
    launch("bounds_kernel", bounds_kernel, shape, stream, BackwardArguments(backward),
           num_targets);
    const Arrays arrays(backward.workspace, backward.layout);
    check(cudaMemcpyAsync(bounds.data(), arrays.bounds, bounds.size() * sizeof(int64_t),
                          cudaMemcpyDeviceToHost, stream),
          "count_touched_rows");
    check(cudaStreamSynchronize(stream), "count_touched_rows");
}

void copy_touched_rows(const Backward& backward, int64_t begin, int64_t count, int64_t width,
                       int64_t* rows, float* values, const DeviceLimits& device,
                       cudaStream_t stream) {
    if (count == 0) return;
    launch("copy_kernel", copy_kernel, flat_shape(count * width, device), stream,
           BackwardArguments(backward), begin, count, width, rows, values);
}

}  // namespace cuda
}  // namespace embcompress
