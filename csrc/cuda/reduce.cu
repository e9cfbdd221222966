// Backward, second half: the gradients of rows, added up over touches that are sorted by row.
//
// A group of lanes takes a chunk of touches. A row whose touches all lie in the chunk is complete
// and goes to the sink; a row that goes on in another chunk leaves a partial sum. The partial sums,
// two of a chunk at most, are the touches of the next level. Chunks have a fixed size, so the order
// of every sum is fixed by the batch alone.

#include "update.cuh"

namespace embcompress {
namespace cuda {
namespace {

constexpr int kAtOnce = 4;  // touches whose loads are under way together

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
    const BoundFeature& feature = plan.feature(number);
    const BoundProbe* bound = plan.probes(feature);
    const int64_t use_number = number * plan.layout->uses_per_feature + j;
    const Use& use = plan.use(use_number);
    const BoundProbe& probe = bound[use.probe];
    const bool multiply = feature.combine == Combine::kMul;
    bool inside;
    const int64_t id = checked_id(feature, inputs.id(position), &inside);
    if (id < 0) return;  // changed since: the host hears of it
    for (int t = 0; t < feature.num_probes; ++t) {
        if (t != use.probe && !multiply) continue;
        const int64_t row = probe_row(bound[t], id);
        tile.rows[t * tile.size + i] = row;
        tile.scales[t * tile.size + i] = row < 0 ? 0.0f : probe_scale(bound[t], id);
    }
    tile.factors[i] = arrays.coefficients[position] * tile.scales[use.probe * tile.size + i];
    tile.gradients[i] = bag % inputs.batch * inputs.num_columns + feature.out_column + probe.column;
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
        const BoundFeature& feature = plan.feature(tile.uses[i + u] / uses);
        const Use& use = plan.use(tile.uses[i + u]);
        const BoundProbe& bound = plan.probes(feature)[use.probe];
        if (is_scalar(use, bound)) continue;
        const float* gradient = arguments.gradient + tile.gradients[i + u];
        const bool aligned = is_aligned(gradient, 0);
        load_some(gradient, column, bound.width, aligned, values[u]);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
        if (tile.keys[i + u] < 0) continue;
        const BoundFeature& feature = plan.feature(tile.uses[i + u] / uses);
        const Use& use = plan.use(tile.uses[i + u]);
        const BoundProbe* bound = plan.probes(feature);
        const BoundProbe& own = bound[use.probe];
        if (is_scalar(use, own)) {
            const int64_t target = use.role == Role::kScale ? own.scale()->column : 0;
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
            if (column + c >= own.width) continue;
            if (use.role == Role::kRows) {
                const float latent = stored_number(own, row, column + c);
                if (!latent_of(own, row, column + c, latent).inside) values[u][c] = 0.0f;
            } else {
                values[u][c] *= step_factor(own, use.role, row, column + c);
            }
        }
    }
}

// Hands over the complete gradient of a row. Not inlined: it is the end of every row's sum, in many
// places of the loop over touches.
__device__ __noinline__ void write_row(const BackwardArguments& arguments, const PlanView plan,
                                       const Group group, int64_t key, int64_t column,
                                       const float4 row_sum) {
    const float sum[kColumns] = {row_sum.x, row_sum.y, row_sum.z, row_sum.w};
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
        for (int c = 0; c < kColumns; ++c) {
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
                write_row(arguments, plan, group, key, column,
                          make_float4(sum[0], sum[1], sum[2], sum[3]));
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
                const uint32_t touch =
                    atomic ? arrays.touches[position + i] : arrays.sorted_touches[position + i];
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
    const int64_t column = (static_cast<int64_t>(blockIdx.z) * group.lanes + group.lane) * kColumns;
    const int64_t groups = blockDim.x / group.lanes;
    const int64_t chunks = (reduce.level.count + kTouchesPerChunk - 1) / kTouchesPerChunk;
    for (int64_t chunk = blockIdx.x * groups + group.number; chunk < chunks;
         chunk += gridDim.x * groups) {
        reduce_chunk<kTouches>(arguments, reduce.level, plan, group, tile, chunk, column);
    }
}

template <bool kTouches>
void launch_reduce(const Backward& backward, const Level& level, const DeviceLimits& device,
                   cudaStream_t stream) {
    ReduceArguments reduce{};
    reduce.level = level;
    const int probes = kTouches ? backward.plan.layout.most_probes : 0;
    reduce.lanes = lanes_for(backward.widest, kColumns, probes);
    reduce.tile = static_cast<int32_t>(tile_size(reduce.lanes));
    const int64_t bytes = touch_group_bytes(reduce.tile, probes);
    LaunchShape shape;
    shape.threads = threads_for(reduce.lanes, bytes);
    const int64_t groups = shape.threads / reduce.lanes;
    shape.blocks = grid_blocks(divide_up(level.count, kTouchesPerChunk), groups, device);
    shape.chunks = divide_up(backward.widest, reduce.lanes * kColumns);
    shape.shared_bytes = groups * bytes;
    launch("reduce_kernel", reduce_kernel<kTouches>, shape, stream, backward.plan,
           BackwardArguments(backward), reduce);
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

}  // namespace cuda
}  // namespace embcompress
