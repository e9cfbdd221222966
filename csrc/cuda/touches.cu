// Backward, first half: which rows every id touches, the numbers that multiply gradients, and the
// gradients that are dot products over the columns.

#include <cmath>

#include "touches.cuh"

namespace embcompress {
namespace cuda {
namespace {

// How many ids of a bag count: all but padding. Every lane gets it.
__device__ int64_t counted_ids(const Inputs& inputs, const Group& group,
                               const BoundFeature& feature, int64_t begin, int64_t end) {
    if (feature.padding_idx < 0) return end - begin;
    // In halves that float holds exactly.
    int64_t count = 0;
    for (int64_t p = begin + group.lane; p < end; p += group.lanes) {
        count += inputs.id(p) != feature.padding_idx;
    }
    const float low = group.sum(static_cast<float>(count & 0xFFFF));
    const float high = group.sum(static_cast<float>(count >> 16));
    return (static_cast<int64_t>(high) << 16) + static_cast<int64_t>(low);
}

// A group of lanes for each bag: its number and coefficient for every id, and the keys of its
// touches, by use and position.
__global__ void __launch_bounds__(kThreads, 2)
    touch_kernel(const __grid_constant__ PlanArgument argument,
                 const __grid_constant__ BackwardArguments arguments, int lanes) {
    const PlanView plan(argument);
    const Group group(lanes);
    const Inputs& inputs = arguments.inputs;
    const Arrays arrays(arguments.workspace, arguments.layout);
    const int64_t number = blockIdx.y, groups = blockDim.x / lanes;
    const BoundFeature& feature = plan.feature(number);
    const BoundProbe* bound = plan.probes(feature);
    const int uses = argument.layout.uses_per_feature;
    const int64_t none = static_cast<int64_t>(argument.layout.num_targets)
                         << arguments.key.row_bits;
    for (int64_t sample = blockIdx.x * groups + group.number; sample < inputs.batch;
         sample += gridDim.x * groups) {
        const int64_t bag = number * inputs.batch + sample;
        const int64_t begin = inputs.clamp(inputs.offset(bag));
        const int64_t end = inputs.clamp(inputs.offset(bag + 1));
        if (!inputs.is_bag(bag, arguments.num_bags)) {
            inputs.errors->offsets = 1;
            *arrays.failed = 1;
        }
        float share = 1.0f;
        if (feature.pool == Pool::kMean) {
            const int64_t count = counted_ids(inputs, group, feature, begin, end);
            share = 1.0f / static_cast<float>(count > 1 ? count : 1);
        }
        for (int64_t p = begin + group.lane; p < end; p += lanes) {
            bool inside;
            const int64_t id = checked_id(feature, inputs.id(p), &inside);
            if (!inside) {
                inputs.errors->ids = 1;
                *arrays.failed = 1;
            }
            arrays.bags[p] = static_cast<uint32_t>(bag);
            arrays.coefficients[p] = id < 0 ? 0.0f : inputs.weight(p) * share;
            for (int j = 0; j < uses; ++j) {
                const Use& use = plan.use(number * uses + j);
                const int64_t row =
                    id < 0 || use.probe < 0 ? -1 : touched_row(use, bound[use.probe], id);
                const int64_t touch = j * inputs.num_ids + p;
                arrays.keys[touch] = row < 0 ? none : use.target << arguments.key.row_bits | row;
                arrays.touches[touch] = static_cast<uint32_t>(touch);
            }
        }
    }
}

// The rows and scales of every probe for a tile of positions, in shared memory.
struct ProbeTile {
    int64_t* rows;
    float* scales;
    int size;
    int probes;

    __device__ ProbeTile(unsigned char* memory, int size_, int probes_)
        : rows(reinterpret_cast<int64_t*>(memory)),
          scales(reinterpret_cast<float*>(rows + size_ * probes_)),
          size(size_),
          probes(probes_) {}

    __device__ void fill(int i, const BoundFeature& feature, const BoundProbe* bound,
                         int64_t id) const {
        for (int t = 0; t < feature.num_probes; ++t) {
            const int64_t row = id < 0 ? -1 : probe_row(bound[t], id);
            rows[t * size + i] = row;
            scales[t * size + i] = row < 0 ? 0.0f : probe_scale(bound[t], id);
        }
    }

    EMBCOMPRESS_DEVICE float value(const BoundProbe* bound, int t, int i, int64_t column) const {
        const int64_t row = rows[t * size + i];
        if (row < 0) return 0.0f;
        return value_of(bound[t], row, column, stored_number(bound[t], row, column));
    }

    // The product of what the other probes give, where probes multiply.
    EMBCOMPRESS_DEVICE float others(const BoundFeature& feature, const BoundProbe* bound, int t,
                                    int i, int64_t column) const {
        float product = 1.0f;
        if (feature.combine != Combine::kMul) return product;
        for (int u = 0; u < feature.num_probes; ++u) {
            if (u != t) product *= scales[u * size + i] * value(bound, u, i, column);
        }
        return product;
    }
};

// Dot product over the columns of probe t of a lane: the gradient times what a scale multiplies, or
// times the derivative by a shared step or bias.
__device__ float dot(const Group& group, const BoundFeature& feature, const BoundProbe* bound,
                     int t, Role role, const ProbeTile& tile, int i, const float* gradient) {
    const BoundProbe& probe = bound[t];
    const float* mine = gradient + probe.column;
    const int64_t row = tile.rows[t * tile.size + i];
    float total = 0.0f;
    for (int64_t c = group.lane; c < probe.width && row >= 0; c += group.lanes) {
        float factor;
        if (role == Role::kScale) {
            factor = tile.value(bound, t, i, c);
        } else {
            factor = tile.scales[t * tile.size + i] * step_factor(bound[t], role, row, c);
        }
        total += mine[c] * tile.others(feature, bound, t, i, c) * factor;
    }
    return group.sum(total);
}

// The touches of an id whose gradient is a dot product.
__device__ void write_scalars(const BackwardArguments& arguments, const PlanView& plan,
                              const Group& group, const ProbeTile& tile, int i, int64_t position) {
    const Arrays arrays(arguments.workspace, arguments.layout);
    const int64_t bag = arrays.bags[position], number = bag / arguments.inputs.batch;
    const BoundFeature& feature = plan.feature(number);
    const BoundProbe* bound = plan.probes(feature);
    const float* gradient = gradient_of(arguments, feature, bag);
    const int uses = plan.layout->uses_per_feature;
    for (int j = 0; j < uses; ++j) {
        const Use& use = plan.use(number * uses + j);
        if (use.probe < 0 || !is_scalar(use, bound[use.probe])) continue;
        const float total = dot(group, feature, bound, use.probe, use.role, tile, i, gradient);
        if (group.lane != 0) continue;
        arrays.scalars[j * arguments.inputs.num_ids + position] =
            arrays.coefficients[position] * total;
    }
}

// The gradient of the weight of an id: its vector times the output's gradient.
__device__ void write_weight_gradient(const BackwardArguments& arguments, const PlanView& plan,
                                      const Group& group, const ProbeTile& tile, int i,
                                      int64_t position, float* out) {
    const Arrays arrays(arguments.workspace, arguments.layout);
    const int64_t bag = arrays.bags[position];
    const BoundFeature& feature = plan.feature(bag / arguments.inputs.batch);
    const BoundProbe* bound = plan.probes(feature);
    const float* gradient = gradient_of(arguments, feature, bag);
    const bool multiply = feature.combine == Combine::kMul;
    float total = 0.0f;
    for (int t = 0; t < (multiply ? 1 : feature.num_probes); ++t) {
        total += tile.scales[t * tile.size + i] *
                 dot(group, feature, bound, t, Role::kScale, tile, i, gradient);
    }
    if (group.lane == 0) out[position] = total;
}

// A group of lanes for every tile of positions: dot products over the columns of each id, into the
// scalars of the touches, or into `weights` where that is wanted.
__global__ void __launch_bounds__(kThreads, 2)
    dot_kernel(const __grid_constant__ PlanArgument argument,
               const __grid_constant__ BackwardArguments arguments, int lanes, int size,
               float* weights) {
    EMBCOMPRESS_SHARED(shared);
    const PlanView plan(argument);
    const Group group(lanes);
    const Inputs& inputs = arguments.inputs;
    const Arrays arrays(arguments.workspace, arguments.layout);
    const int probes = argument.layout.most_probes;
    const ProbeTile tile(shared + group.number * size * probes * 12, size, probes);
    const int64_t groups = blockDim.x / lanes;
    if (*arrays.failed) return;
    for (int64_t first = (blockIdx.x * groups + group.number) * size; first < inputs.num_ids;
         first += gridDim.x * groups * size) {
        for (int i = group.lane; i < size && first + i < inputs.num_ids; i += lanes) {
            const BoundFeature& feature = plan.feature(arrays.bags[first + i] / inputs.batch);
            bool inside;
            const int64_t id = checked_id(feature, inputs.id(first + i), &inside);
            tile.fill(i, feature, plan.probes(feature), id);
        }
        group.sync();
        for (int i = 0; i < size && first + i < inputs.num_ids; ++i) {
            if (weights == nullptr) {
                write_scalars(arguments, plan, group, tile, i, first + i);
            } else {
                write_weight_gradient(arguments, plan, group, tile, i, first + i, weights);
            }
        }
        group.sync();
    }
}

LaunchShape tiles_shape(const Backward& backward, const DeviceLimits& device, int lanes, int size) {
    const int64_t group_bytes = int64_t{12} * size * backward.plan.layout.most_probes;
    LaunchShape shape;
    shape.threads = threads_for(lanes, group_bytes);
    const int64_t groups = shape.threads / lanes;
    shape.blocks = grid_blocks(divide_up(backward.inputs.num_ids, size), groups, device);
    shape.shared_bytes = groups * group_bytes;
    return shape;
}

}  // namespace

void find_touches(const Backward& backward, const DeviceLimits& device, cudaStream_t stream) {
    const Inputs& inputs = backward.inputs;
    const BackwardArguments arguments(backward);
    const Arrays arrays(backward.workspace, backward.layout);
    fill_zero(arrays.failed, sizeof(int), stream);
    const int64_t length = divide_up(inputs.num_ids, std::max<int64_t>(1, backward.num_bags));
    const int lanes = lanes_for(length, 1, 0);
    LaunchShape shape;
    shape.features = backward.plan.layout.num_features;
    shape.blocks = grid_blocks(inputs.batch, shape.threads / lanes, device);
    launch("touch_kernel", touch_kernel, shape, stream, backward.plan, arguments, lanes);
    if (backward.layout.num_touches == 0 || !backward.has_scalars) return;
    const int probes = backward.plan.layout.most_probes;
    const int wide = lanes_for(backward.widest_feature, 4, probes),
              size = static_cast<int>(tile_size(wide));
    launch("dot_kernel", dot_kernel, tiles_shape(backward, device, wide, size), stream,
           backward.plan, arguments, wide, size, static_cast<float*>(nullptr));
}

void weights_gradient(const Backward& backward, float* out, const DeviceLimits& device,
                      cudaStream_t stream) {
    if (backward.inputs.num_ids == 0) return;
    const BackwardArguments arguments(backward);
    const int probes = backward.plan.layout.most_probes;
    const int lanes = lanes_for(backward.widest_feature, 4, probes),
              size = static_cast<int>(tile_size(lanes));
    launch("dot_kernel", dot_kernel, tiles_shape(backward, device, lanes, size), stream,
           backward.plan, arguments, lanes, size, out);
}

}  // namespace cuda
}  // namespace embcompress
