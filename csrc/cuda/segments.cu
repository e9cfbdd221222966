// Touched rows side by side: numbered, updated once all gradients are complete, or handed out as a
// sparse gradient.

#include "update.cuh"

namespace embcompress {
namespace cuda {
namespace {

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

}  // namespace

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

void update_segments(const Backward& backward, const DeviceLimits& device, cudaStream_t stream) {
    if (backward.layout.num_touches == 0) return;
    const int lanes = lanes_for(backward.widest, kColumns, 0);
    LaunchShape shape;
    shape.blocks = grid_blocks(backward.layout.most_segments, shape.threads / lanes, device);
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
    launch("bounds_kernel", bounds_kernel, shape, stream, BackwardArguments(backward), num_targets);
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
