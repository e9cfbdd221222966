// Forward of the plainest features, whose probes read float32 rows: each lane of a group finds the
// rows of one id and hands them round, so that there is no shared memory and no barrier. Where
// probes lie side by side, a lane finds the rows of its own columns for every id instead.

#include "gather.cuh"
#include "kernels.h"

namespace embcompress {
namespace cuda {
namespace {

// Rows that a lane has under way: more would cost registers, and these blocks on a multiprocessor.
constexpr int kRowsAtOnce = 4;
static_assert(kRowsAtOnce >= kMostPlainProbes, "a lane reads an id at least");
constexpr uint32_t kNoRow = 0xFFFFFFFFu;

struct PlainArguments {
    Inputs inputs;
    float* out;
    int64_t first_feature;  // of the plan's order
    int32_t lanes;
    int32_t bags;  // that a group pools one after the other, a lane's number of them at most
};

// The probes whose rows a lane reads, and where its columns are in row 0.
template <int kProbes, bool kPlaced>
struct LaneProbes {
    const BoundProbe* first;
    const float* data[kProbes];

    __device__ LaneProbes(const BoundFeature&, const BoundProbe* all, int64_t column) : first(all) {
#pragma unroll
        for (int t = 0; t < kProbes; ++t) {
            data[t] = static_cast<const float*>(all[t].store.data) + column;
        }
    }
    EMBCOMPRESS_DEVICE const BoundProbe* bound(int t) const { return first + t; }
};

// Those that reach its columns, where probes lie side by side.
template <int kProbes>
struct LaneProbes<kProbes, true> {
    const BoundProbe* reaching[kProbes];  // nullptr: none
    const float* data[kProbes];

    __device__ LaneProbes(const BoundFeature& feature, const BoundProbe* all, int64_t column) {
#pragma unroll
        for (int t = 0; t < kProbes; ++t) reaching[t] = nullptr;
        for (int64_t t = feature.num_probes - 1; t >= 0; --t) {
            const int64_t inside = column - all[t].column;
            if (inside < 0 || inside >= all[t].width) continue;
            if constexpr (kProbes == 2) {
                reaching[1] = reaching[0];
                data[1] = data[0];
            }
            reaching[0] = all + t;
            data[0] = static_cast<const float*>(all[t].store.data) + inside;
        }
    }
    EMBCOMPRESS_DEVICE const BoundProbe* bound(int t) const { return reaching[t]; }
};

// What a lane knows of the id at its position.
template <int kProbes, bool kPlaced>
struct Found {
    int64_t id;  // checked; negative: none
    float weight;

    EMBCOMPRESS_DEVICE bool is_counted() const { return id >= 0; }
};

// Its rows, where all lanes read the same ones.
template <int kProbes>
struct Found<kProbes, false> {
    uint32_t rows[kProbes];
    float weight;
    bool counted;

    EMBCOMPRESS_DEVICE bool is_counted() const { return counted; }
};

EMBCOMPRESS_DEVICE uint32_t plain_row(int64_t row) {
    return row < 0 ? kNoRow : static_cast<uint32_t>(row);
}

template <int kProbes, bool kPlaced>
EMBCOMPRESS_DEVICE Found<kProbes, kPlaced> find_id(const Inputs& inputs,
                                                   const BoundFeature& feature,
                                                   const LaneProbes<kProbes, kPlaced>& probes,
                                                   int position, bool exists, int64_t id) {
    bool inside = true;
    if (exists) id = checked_id(feature, id, &inside);
    if (!inside) inputs.errors->ids = 1;
    if (!exists) id = -1;
    Found<kProbes, kPlaced> found;
    if constexpr (kPlaced) {
        found.id = id;
    } else {
        found.counted = id >= 0;
#pragma unroll
        for (int t = 0; t < kProbes; ++t) {
            found.rows[t] = plain_row(id < 0 ? -1 : probe_row<false>(*probes.bound(t), id));
        }
    }
    found.weight = id < 0 ? 0.0f : inputs.weight(position);
    return found;
}

// Rows of U ids in the store of one probe: their codes are under way before the first is used.
template <int U>
EMBCOMPRESS_DEVICE void find_rows(const BoundProbe& bound, const int64_t (&ids)[U],
                                  uint32_t (&rows)[U]) {
    const BoundCode* code = bound.code();
    if (code == nullptr || code->table.codes.is_slot) {
#pragma unroll
        for (int u = 0; u < U; ++u) {
            rows[u] = plain_row(ids[u] < 0 ? -1 : probe_row<false>(bound, ids[u]));
        }
        return;
    }
    const BoundTable& table = code->table;
    uint32_t codes[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
        codes[u] = 0;
        if (ids[u] >= 0) {
            codes[u] =
                read_code(table.codes, table.data, table.bytes, row_of(bound.address, ids[u]));
        }
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
        int64_t row = -1;
        if (ids[u] >= 0) row = or_otherwise<false>(*code, ids[u], code_row(table.codes, codes[u]));
        rows[u] = plain_row(row < 0 ? -1 : row + bound.offset);
    }
}

// Columns of the rows of U ids, the first of which lane `first` of the group has found: all loads
// are under way before the first is used.
template <int kProbes, bool kPlaced, int U, int C>
EMBCOMPRESS_DEVICE void load_rows(const Group& group, const Found<kProbes, kPlaced>& found,
                                  int first, int count, const LaneProbes<kProbes, kPlaced>& probes,
                                  int width, bool active, float (&part)[kProbes][U][C]) {
    uint32_t rows[kProbes][U];
    if constexpr (kPlaced) {
        int64_t ids[U];
#pragma unroll
        for (int u = 0; u < U; ++u) ids[u] = u < count ? group.read(found.id, first + u) : -1;
#pragma unroll
        for (int t = 0; t < kProbes; ++t) {
#pragma unroll
            for (int u = 0; u < U; ++u) rows[t][u] = kNoRow;
            if (const BoundProbe* own = probes.bound(t)) find_rows<U>(*own, ids, rows[t]);
        }
    } else {
#pragma unroll
        for (int u = 0; u < U; ++u) {
#pragma unroll
            for (int t = 0; t < kProbes; ++t) {
                rows[t][u] = u < count ? group.read(found.rows[t], first + u) : kNoRow;
            }
        }
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int t = 0; t < kProbes; ++t) {
#pragma unroll
            for (int c = 0; c < C; ++c) part[t][u][c] = 0.0f;
            if (!active || rows[t][u] == kNoRow) continue;
            const int row_width = kPlaced ? probes.bound(t)->width : width;
            read_floats(probes.data[t] + static_cast<uint64_t>(rows[t][u]) * row_width, part[t][u]);
        }
    }
}

// The rows of an id, combined.
template <int kProbes, int U, int C>
EMBCOMPRESS_DEVICE float combined(const float (&part)[kProbes][U][C], int u, int c, bool multiply) {
    float value = part[0][u][c];
#pragma unroll
    for (int t = 1; t < kProbes; ++t) {
        value = multiply ? value * part[t][u][c] : value + part[t][u][c];
    }
    return value;
}

// Pools bags [first, first + count) of a feature into columns [column, column + C).
template <int kProbes, bool kPlaced, int C>
EMBCOMPRESS_DEVICE void pool_plain(const PlainArguments& arguments, const Group& group,
                                   const BoundFeature& feature,
                                   const LaneProbes<kProbes, kPlaced>& probes, int64_t number,
                                   int64_t first, int count, int64_t column, int64_t num_bags) {
    constexpr int U = kRowsAtOnce / kProbes;
    const Inputs& inputs = arguments.inputs;
    const int64_t bag = number * inputs.batch + first;
    const int width = static_cast<int>(feature.width);
    const bool active = column < width, weighted = inputs.weights != nullptr;
    const bool multiply = feature.combine == Combine::kMul, mean = feature.pool == Pool::kMean;
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
    float sum[C] = {};
    int counted = 0, done = 0;
    int next_end = group.read(ends, 0);
    const auto finish_bag = [&] {
        if (mean && counted > 0) {
            const float divisor = static_cast<float>(counted);
#pragma unroll
            for (int c = 0; c < C; ++c) sum[c] /= divisor;
        }
        if (active) store_some(out, column, width, aligned, sum);
#pragma unroll
        for (int c = 0; c < C; ++c) sum[c] = 0.0f;
        counted = 0;
        out += inputs.num_columns;
        if (++done < count) next_end = group.read(ends, done);
    };
    while (done < count && next_end <= begin) finish_bag();
    const auto id_at = [&](int at) { return at < end ? inputs.id(at) : 0; };
    int64_t ahead = id_at(begin + group.lane);
    for (int position = begin; position < end; position += group.lanes) {
        const int own = position + group.lane;
        const auto found =
            find_id<kProbes, kPlaced>(inputs, feature, probes, own, own < end, ahead);
        // Under way while rows are read.
        ahead = id_at(own + group.lanes);
        const unsigned known = group.ballot(found.is_counted());
        const int n = end - position < group.lanes ? end - position : group.lanes;
        for (int i = 0; i < n; i += U) {
            float part[kProbes][U][C];
            load_rows(group, found, i, n - i, probes, width, active, part);
#pragma unroll
            for (int u = 0; u < U; ++u) {
                if (i + u >= n) break;
                const float weight = weighted ? group.read(found.weight, i + u) : 1.0f;
#pragma unroll
                for (int c = 0; c < C; ++c) {
                    const float value = combined(part, u, c, multiply);
                    sum[c] += weighted ? value * weight : value;
                }
                counted += known >> (i + u) & 1;
                while (done < count && next_end <= position + i + u + 1) finish_bag();
            }
        }
    }
    while (done < count) finish_bag();
}

template <int kProbes, bool kPlaced, int C>
__global__ void __launch_bounds__(kThreads, plain_blocks(kPlaced, kProbes))
    plain_kernel(const __grid_constant__ PlanArgument argument,
                 const __grid_constant__ PlainArguments arguments) {
    const PlanView plan(argument);
    const int64_t number = plan.ordered(arguments.first_feature + blockIdx.y);
    const BoundFeature& feature = plan.feature(number);
    const Group group(arguments.lanes);
    const int64_t column = (static_cast<int64_t>(blockIdx.z) * group.lanes + group.lane) * C;
    const int64_t groups = blockDim.x / group.lanes, batch = arguments.inputs.batch;
    const int64_t num_bags = argument.layout.num_features * batch;
    const int64_t first = (blockIdx.x * groups + group.number) * arguments.bags;
    if (first >= batch) return;
    const int64_t left = batch - first;
    const int count = left < arguments.bags ? static_cast<int>(left) : arguments.bags;
    const LaneProbes<kProbes, kPlaced> probes(feature, plan.probes(feature), column);
    pool_plain<kProbes, kPlaced, C>(arguments, group, feature, probes, number, first, count, column,
                                    num_bags);
}

using PlainKernel = void (*)(PlanArgument, PlainArguments);

PlainKernel kernel_for(const FeatureClass& which) {
    if (which.kind == Kind::kPlaced) {
        if (which.columns == 2) return plain_kernel<1, true, 2>;
        return which.probes == 1 ? plain_kernel<1, true, 4> : plain_kernel<2, true, 4>;
    }
    const PlainKernel kernels[kMostPlainProbes] = {
        plain_kernel<1, false, 4>, plain_kernel<2, false, 4>, plain_kernel<3, false, 4>,
        plain_kernel<4, false, 4>};
    return kernels[which.probes - 1];
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
    launch("plain_kernel", kernel_for(which.which), shape, stream, plan, arguments);
}

}  // namespace cuda
}  // namespace embcompress
