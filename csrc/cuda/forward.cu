// Forward: a group of lanes pools a run of bags. Its lanes first find the rows of a tile of ids, an
// id each, then read the rows of one id after another together, 16 bytes a lane.

#include "gather.cuh"
#include "kernels.h"

namespace embcompress {
namespace cuda {
namespace {

struct PoolArguments {
    Inputs inputs;
    PoolShape shape;
    float* out;
    int64_t first_feature;  // of the plan's order
    int32_t lanes;
    int32_t most_probes;
};

// What a group knows of a tile of ids, in shared memory.
struct Tile {
    int64_t* rows;     // probe by probe, -1: none
    int64_t* ends;     // of the bags of the run
    float* scales;     // probe by probe
    float* weights;    // 0 for padding
    int32_t* counted;  // 1, or 0 for padding
    uint32_t* reach;   // lane by lane: the probes that reach its columns
    int size;

    __device__ Tile(unsigned char* memory, int size_, int probes) : size(size_) {
        rows = reinterpret_cast<int64_t*>(memory);
        ends = rows + size * probes;
        scales = reinterpret_cast<float*>(ends + size);
        weights = scales + size * probes;
        counted = reinterpret_cast<int32_t*>(weights + size);
        reach = reinterpret_cast<uint32_t*>(counted + size);
    }
};

// Copies the records of the block's feature to shared memory, and its hot stores.
__device__ const BoundProbe* copy_plan(const PoolArguments& arguments, const PlanView& plan,
                                       const BoundFeature& feature, unsigned char* shared) {
    const BoundProbe* probes = plan.probes(feature);
    if (arguments.shape.plan_bytes == 0) return probes;
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    int64_t* copy = reinterpret_cast<int64_t*>(shared);
    for (int64_t w = thread; w < feature.num_words; w += threads) {
        copy[w] = reinterpret_cast<const int64_t*>(probes)[w];
    }
    BoundProbe* bound = reinterpret_cast<BoundProbe*>(shared);
    __syncthreads();
    if (arguments.shape.staged_bytes > 0) {
        unsigned char* stores = shared + arguments.shape.plan_bytes;
        for (int64_t t = 0; t < feature.num_probes; ++t) {
            const StoreView& store = probes[t].store;
            if (probes[t].staged_at < 0) continue;
            const unsigned char* from = static_cast<const unsigned char*>(store.data);
            unsigned char* to = stores + probes[t].staged_at;
            const bool wide = reinterpret_cast<uintptr_t>(from) % 16 == 0;
            const int64_t quads = wide ? store.bytes / 16 : 0;
            for (int64_t q = thread; q < quads; q += threads) {
                at<uint4>(to + 16 * q) = at<uint4>(from + 16 * q);
            }
            for (int64_t b = quads * 16 + thread; b < store.bytes; b += threads) to[b] = from[b];
            if (thread == 0) bound[t].store.data = to;
        }
        __syncthreads();
    }
    return bound;
}

// Finds what the ids [position, position + tile) read, those before `end`.
__device__ void fill_tile(const PoolArguments& arguments, const Group& group,
                          const BoundFeature& feature, const BoundProbe* bound, int64_t position,
                          int64_t end, const Tile& tile) {
    const Inputs& inputs = arguments.inputs;
    for (int i = group.lane; i < tile.size; i += group.lanes) {
        int64_t id = -1;
        if (position + i < end) {
            bool inside;
            id = checked_id(feature, inputs.id(position + i), &inside);
            if (!inside) inputs.errors->ids = 1;
        }
        for (int t = 0; t < feature.num_probes; ++t) {
            const int64_t row = id < 0 ? -1 : probe_row(bound[t], id);
            tile.rows[t * tile.size + i] = row;
            tile.scales[t * tile.size + i] = row < 0 ? 0.0f : probe_scale(bound[t], id);
        }
        tile.counted[i] = id < 0 ? 0 : 1;
        tile.weights[i] = id < 0 ? 0.0f : inputs.weight(position + i);
    }
}

// From the first to the last probe that reaches columns [column, column + C): of the many parts of
// a concatenation, a few. Begin and end in 16 bits each: no block holds what more probes need.
template <int C>
EMBCOMPRESS_DEVICE uint32_t probes_at(const BoundFeature& feature, const BoundProbe* bound,
                                      int column) {
    const int num_probes = static_cast<int>(feature.num_probes);
    int begin = 0, end = num_probes;
    if (feature.combine == Combine::kPlace) begin = num_probes, end = 0;
    for (int t = num_probes - 1; t >= 0 && feature.combine == Combine::kPlace; --t) {
        const BoundProbe& probe = bound[t];
        if (probe.column + probe.width <= column || probe.column >= column + C) continue;
        begin = t;
        if (end == 0) end = t + 1;
    }
    return static_cast<uint32_t>(end) << 16 | static_cast<uint32_t>(begin);
}

// Vectors of U ids, `column` on: probes combined.
template <int C, int U>
EMBCOMPRESS_DEVICE void combine(const BoundFeature& feature, const BoundProbe* bound,
                                const Tile& tile, uint32_t reach, int i, int column,
                                float (&values)[U][C]) {
    const bool multiply = feature.combine == Combine::kMul;
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int c = 0; c < C; ++c) values[u][c] = multiply ? 1.0f : 0.0f;
    }
    const int end = static_cast<int>(reach >> 16);
    for (int t = static_cast<int>(reach & 0xFFFF); t < end; ++t) {
        const BoundProbe& probe = bound[t];
        const int first = column - probe.column;
        if (first + C <= 0 || first >= probe.width) continue;
        float part[U][C];
        load_values<C, U>(bound[t], tile.rows + t * tile.size + i, first, part);
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const float scale = tile.scales[t * tile.size + i + u];
            const bool scaled = probe.scale_at != 0;
#pragma unroll
            for (int c = 0; c < C; ++c) {
                const float value = scaled ? part[u][c] * scale : part[u][c];
                values[u][c] = multiply ? values[u][c] * value : values[u][c] + value;
            }
        }
    }
}

// Pools bags [first, first + count) of a feature into columns [column, column + C).
template <int C>
EMBCOMPRESS_DEVICE void pool_run(const PoolArguments& arguments, const Group& group,
                                 const BoundFeature& feature, const BoundProbe* bound,
                                 const Tile& tile, int64_t feature_number, int64_t first, int count,
                                 int column, int64_t num_bags) {
    constexpr int U = 16 / C;
    const Inputs& inputs = arguments.inputs;
    const int64_t bag = feature_number * inputs.batch + first;
    for (int k = group.lane; k < count; k += group.lanes) {
        tile.ends[k] = inputs.clamp(inputs.offset(bag + k + 1));
        if (!inputs.is_bag(bag + k, num_bags)) inputs.errors->offsets = 1;
    }
    const int64_t begin = inputs.clamp(inputs.offset(bag));
    const int64_t end = inputs.clamp(inputs.offset(bag + count));
    const bool active = column < feature.width;
    const bool weighted = inputs.weights != nullptr, mean = feature.pool == Pool::kMean;
    float* out = arguments.out + first * inputs.num_columns + feature.out_column;
    const bool aligned = is_aligned(arguments.out + feature.out_column, inputs.num_columns);
    float sum[C];
    int32_t counted = 0;
    int k = 0;
    const auto restart = [&] {
        counted = 0;
#pragma unroll
        for (int c = 0; c < C; ++c) sum[c] = 0.0f;
    };
    const auto finish_bag = [&] {
        if (mean && counted > 0) {
            const float divisor = static_cast<float>(counted);
#pragma unroll
            for (int c = 0; c < C; ++c) sum[c] /= divisor;
        }
        if (active) {
            store_some(out, column, feature.width, aligned, sum);
        }
        out += inputs.num_columns;
        restart();
        ++k;
    };
    restart();
    group.sync();
    while (k < count && tile.ends[k] <= begin) finish_bag();
    for (int64_t position = begin; position < end; position += tile.size) {
        fill_tile(arguments, group, feature, bound, position, end, tile);
        group.sync();
        const int n = static_cast<int>(end - position < tile.size ? end - position : tile.size);
        for (int i = 0; i < n; i += U) {
            float values[U][C];
            if (active)
                combine<C, U>(feature, bound, tile, tile.reach[group.lane], i, column, values);
#pragma unroll
            for (int u = 0; u < U; ++u) {
                if (i + u >= n) continue;
                const float weight = tile.weights[i + u];
                if (active) {
#pragma unroll
                    for (int c = 0; c < C; ++c) {
                        sum[c] += weighted ? values[u][c] * weight : values[u][c];
                    }
                }
                counted += tile.counted[i + u];
                while (k < count && tile.ends[k] <= position + i + u + 1) finish_bag();
            }
        }
        group.sync();
    }
    while (k < count) finish_bag();
}

template <int C>
__global__ void __launch_bounds__(kThreads, 2)
    pool_kernel(const __grid_constant__ PlanArgument argument,
                const __grid_constant__ PoolArguments arguments) {
    EMBCOMPRESS_SHARED(shared);
    const PlanView plan(argument);
    const PoolShape& shape = arguments.shape;
    const int64_t number = plan.ordered(arguments.first_feature + blockIdx.y);
    const BoundFeature& feature = plan.feature(number);
    const BoundProbe* bound = copy_plan(arguments, plan, feature, shared);
    const Group group(arguments.lanes);
    const int column = (static_cast<int>(blockIdx.z) * group.lanes + group.lane) * C;
    unsigned char* tiles = shared + shape.plan_bytes + shape.staged_bytes;
    const Tile tile(tiles + group.number * shape.group_bytes, shape.tile, arguments.most_probes);
    tile.reach[group.lane] = probes_at<C>(feature, bound, column);
    const int64_t groups = blockDim.x / group.lanes, batch = arguments.inputs.batch;
    const int64_t num_bags = argument.layout.num_features * batch;
    for (int64_t first = (blockIdx.x * groups + group.number) * shape.bags; first < batch;
         first += gridDim.x * groups * shape.bags) {
        const int64_t left = batch - first;
        const int count = left < shape.bags ? static_cast<int>(left) : shape.bags;
        pool_run<C>(arguments, group, feature, bound, tile, number, first, count, column, num_bags);
        group.sync();
    }
}

template <int C>
void launch_pool(const PlanArgument& plan, const PoolArguments& arguments, const PoolLaunch& which,
                 cudaStream_t stream) {
    LaunchShape shape;
    shape.blocks = which.shape.blocks;
    shape.features = which.count;
    shape.chunks = which.shape.chunks;
    shape.threads = which.shape.threads;
    shape.shared_bytes = which.shape.shared_bytes;
    launch("pool_kernel", pool_kernel<C>, shape, stream, plan, arguments);
}

}  // namespace

void pool(const PlanArgument& plan, const Inputs& inputs, const PoolLaunch& which, float* out,
          cudaStream_t stream) {
    if (which.which.kind != Kind::kAny) return pool_plain(plan, inputs, which, out, stream);
    PoolArguments arguments{};
    arguments.inputs = inputs;
    arguments.shape = which.shape;
    arguments.out = out;
    arguments.first_feature = which.first;
    arguments.lanes = which.which.lanes;
    arguments.most_probes = which.most_probes;
    if (which.which.columns == 8) {
        launch_pool<8>(plan, arguments, which, stream);
    } else {
        launch_pool<4>(plan, arguments, which, stream);
    }
}

}  // namespace cuda
}  // namespace embcompress
