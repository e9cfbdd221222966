// Forward of the plainest features, those of one or two probes of float32 rows: each lane of a
// group finds the rows of one id and hands them round, so that there is no shared memory and no
// barrier.

#include "gather.cuh"
#include "kernels.h"

namespace embcompress {
namespace cuda {
namespace {

constexpr int kColumns = 4;  // of a lane: 16 bytes
// Rows of one or of two probes that a lane has under way: more would cost registers, and these
// blocks on a multiprocessor.
constexpr int kRowsOfOne = 4;
constexpr int kRowsOfTwo = 2;
constexpr uint32_t kNoRow = 0xFFFFFFFFu;

struct PlainArguments {
    Inputs inputs;
    float* out;
    int64_t first_feature;  // of the plan's order
    int32_t lanes;
    int32_t bags;  // that a group pools one after the other, a lane's number of them at most
};

// What a lane knows of the id that it has found.
template <int kProbes>
struct Found {
    uint32_t rows[kProbes];
    float weight;
    bool is_counted;
};

template <int kProbes>
EMBCOMPRESS_DEVICE Found<kProbes> find_rows(const Inputs& inputs, const Feature& feature,
                                            const BoundProbe* bound, int position, bool exists,
                                            int64_t id) {
    bool inside = true;
    if (exists) id = checked_id(feature, id, &inside);
    if (!inside) inputs.errors->ids = 1;
    if (!exists) id = -1;
    Found<kProbes> found;
#pragma unroll
    for (int t = 0; t < kProbes; ++t) {
        const int64_t row = id < 0 ? -1 : probe_row<false>(bound[t], id);
        found.rows[t] = row < 0 ? kNoRow : static_cast<uint32_t>(row);
    }
    found.weight = id < 0 ? 0.0f : inputs.weight(position);
    found.is_counted = id >= 0;
    return found;
}

// Columns of the rows of U ids, the first of which lane `first` of the warp has found: all loads
// are under way before the first is used.
template <int kProbes, int U>
EMBCOMPRESS_DEVICE void load_rows(const Group& group, const Found<kProbes>& found, int first,
                                  int count, const float* const (&data)[kProbes], int width,
                                  bool active, float (&part)[kProbes][U][kColumns]) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int t = 0; t < kProbes; ++t) {
            const uint32_t row = u < count ? group.read(found.rows[t], first + u) : kNoRow;
#pragma unroll
            for (int c = 0; c < kColumns; ++c) part[t][u][c] = 0.0f;
            if (active && row != kNoRow)
                read_floats(data[t] + static_cast<uint64_t>(row) * width, part[t][u]);
        }
    }
}

// Pools bags [first, first + count) of a feature into columns [column, column + 4).
template <int kProbes>
EMBCOMPRESS_DEVICE void pool_plain(const PlainArguments& arguments, const Group& group,
                                   const Feature& feature, const BoundProbe* bound, int64_t number,
                                   int64_t first, int count, int64_t column, int64_t num_bags) {
    constexpr int U = kProbes == 1 ? kRowsOfOne : kRowsOfTwo;
    const Inputs& inputs = arguments.inputs;
    const int64_t bag = number * inputs.batch + first;
    const int width = static_cast<int>(feature.width);
    const bool active = column < width, weighted = inputs.weights != nullptr;
    const bool multiply = feature.combine == Combine::kMul, mean = feature.pool == Pool::kMean;
    const float* data[kProbes];
#pragma unroll
    for (int t = 0; t < kProbes; ++t) {
        data[t] = static_cast<const float*>(bound[t].store.data) + column;
    }
    // Positions of ids fit 32 bits: kMostIds.
    const int begin = static_cast<int>(inputs.clamp(inputs.offset(bag)));
    const int end = static_cast<int>(inputs.clamp(inputs.offset(bag + count)));
    int ends = 0;
    if (group.lane < count) {
        ends = static_cast<int>(inputs.clamp(inputs.offset(bag + group.lane + 1)));
        if (!inputs.is_bag(bag + group.lane, num_bags)) inputs.errors->offsets = 1;
    }
    float* out = arguments.out + first * inputs.num_columns + feature.out_column;
    const bool aligned = is_aligned(out, inputs.num_columns);
    float sum[kColumns] = {0.0f, 0.0f, 0.0f, 0.0f};
    int counted = 0, done = 0;
    int next_end = group.read(ends, 0);
    const auto finish_bag = [&] {
        if (mean && counted > 0) {
            const float divisor = static_cast<float>(counted);
#pragma unroll
            for (int c = 0; c < kColumns; ++c) sum[c] /= divisor;
        }
        if (active) store_some(out, column, width, aligned, sum);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sum[c] = 0.0f;
        counted = 0;
        out += inputs.num_columns;
        if (++done < count) next_end = group.read(ends, done);
    };
    while (done < count && next_end <= begin) finish_bag();
    const auto id_at = [&](int at) { return at < end ? inputs.id(at) : 0; };
    int64_t ahead = id_at(begin + group.lane);
    for (int position = begin; position < end; position += group.lanes) {
        const int own = position + group.lane;
        const Found<kProbes> found =
            find_rows<kProbes>(inputs, feature, bound, own, own < end, ahead);
        // Under way while rows are read.
        ahead = id_at(own + group.lanes);
        const unsigned known = group.ballot(found.is_counted);
        const int n = end - position < group.lanes ? end - position : group.lanes;
        for (int i = 0; i < n; i += U) {
            float part[kProbes][U][kColumns];
            load_rows<kProbes, U>(group, found, i, n - i, data, width, active, part);
#pragma unroll
            for (int u = 0; u < U; ++u) {
                if (i + u >= n) break;
                const float weight = weighted ? group.read(found.weight, i + u) : 1.0f;
#pragma unroll
                for (int c = 0; c < kColumns; ++c) {
                    const float other = part[kProbes - 1][u][c];
                    const float value = kProbes == 1 ? other
                                        : multiply   ? part[0][u][c] * other
                                                     : part[0][u][c] + other;
                    sum[c] += weighted ? value * weight : value;
                }
                counted += known >> (i + u) & 1;
                while (done < count && next_end <= position + i + u + 1) finish_bag();
            }
        }
    }
    while (done < count) finish_bag();
}

template <int kProbes>
__global__ void __launch_bounds__(kThreads, kPlainBlocks)
    plain_kernel(const __grid_constant__ PlanArgument argument,
                 const __grid_constant__ PlainArguments arguments) {
    const PlanView plan(argument);
    const int64_t number = plan.ordered(arguments.first_feature + blockIdx.y);
    const Feature& feature = plan.feature(number);
    const BoundProbe* bound = plan.probes(feature);
    const Group group(arguments.lanes);
    const int64_t column = (static_cast<int64_t>(blockIdx.z) * group.lanes + group.lane) * kColumns;
    const int64_t groups = blockDim.x / group.lanes, batch = arguments.inputs.batch;
    const int64_t num_bags = argument.layout.num_features * batch;
    const int64_t first = (blockIdx.x * groups + group.number) * arguments.bags;
    if (first >= batch) return;
    const int64_t left = batch - first;
    const int count = left < arguments.bags ? static_cast<int>(left) : arguments.bags;
    pool_plain<kProbes>(arguments, group, feature, bound, number, first, count, column, num_bags);
}

}  // namespace

void pool_plain(const PlanArgument& plan, const Inputs& inputs, const PoolLaunch& which, float* out,
                cudaStream_t stream) {
    LaunchShape shape;
    shape.blocks = which.shape.blocks;
    shape.features = which.count;
    shape.chunks = which.shape.chunks;
    shape.threads = which.shape.threads;
    const PlainArguments arguments{inputs, out, which.first, which.which.lanes, which.shape.bags};
    const auto kernel = which.which.kind == Kind::kOne ? plain_kernel<1> : plain_kernel<2>;
    launch("plain_kernel", kernel, shape, stream, plan, arguments);
}

}  // namespace cuda
}  // namespace embcompress
