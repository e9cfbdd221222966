// What the binding calls: launches on a stream, over plain pointers. Nothing waits for the device
// but count_touched_rows.

#pragma once

#include "inputs.h"
#include "shapes.h"

namespace embcompress {
namespace cuda {

struct OptimizerSettings {
    int32_t kind;  // OptimizerKind
    float learning_rate;
    float epsilon;
    float weight_decay;
    float beta1;
    float beta2;
};

// Limits of the current device.
DeviceLimits device_limits();

// Where the kernels of this process report what is wrong with ids and offsets. Allocated by the
// first call, which must not be while a graph is captured.
Errors* error_flags();

// Writes a plan that is too large for a launch to device memory.
void upload(const PlanWords& plan, int64_t* memory, cudaStream_t stream);

void fill_zero(void* memory, int64_t bytes, cudaStream_t stream);

// Features of one class, [first, first + count) of the plan's order.
struct PoolLaunch {
    FeatureClass which;
    PoolShape shape;
    int64_t first;
    int64_t count;
    int32_t most_probes;  // of one of them
};

// Pools the bags of these features.
void pool(const PlanArgument& plan, const Inputs& inputs, const PoolLaunch& launch, float* out,
          cudaStream_t stream);

// The same for features of Kind::kPlain and Kind::kPlaced.
void pool_plain(const PlanArgument& plan, const Inputs& inputs, const PoolLaunch& launch,
                float* out, cudaStream_t stream);

// Where the gradients of rows go.
enum class SinkKind : int32_t { kDense, kCompact, kUpdate, kAtomic };

struct Backward {
    PlanArgument plan;
    Inputs inputs;
    BackwardLayout layout;
    KeyShape key;
    SinkKind sink;
    OptimizerSettings optimizer;
    const float* gradient;  // of the output
    unsigned char* workspace;
    int64_t num_bags;
    int64_t widest;          // row of a target
    int64_t widest_feature;  // before heads
    int rounds;              // of updates
    bool has_scalars;
};

size_t scratch_bytes(int64_t touches, int key_bits);

// Finds which rows every id touches, and sorts the touches by row.
void find_touches(const Backward& backward, const DeviceLimits& device, cudaStream_t stream);
// Adds up the gradients of all rows, into the sink.
void add_gradients(const Backward& backward, const DeviceLimits& device, cudaStream_t stream);
// Numbers the rows that sorted touches touch, for a compact sink.
void number_segments(const Backward& backward, const DeviceLimits& device, cudaStream_t stream);
// The update of the rows that a compact sink holds.
void update_segments(const Backward& backward, const DeviceLimits& device, cudaStream_t stream);
// Waits. bounds[k] is the number of the first touched row of target k, of num_targets + 1.
void count_touched_rows(const Backward& backward, std::vector<int64_t>& bounds,
                        cudaStream_t stream);
// Row numbers and values of one target from a compact sink.
void copy_touched_rows(const Backward& backward, int64_t begin, int64_t count, int64_t width,
                       int64_t* rows, float* values, const DeviceLimits& device,
                       cudaStream_t stream);

// Gradient of the per-sample weights.
void weights_gradient(const Backward& backward, float* out, const DeviceLimits& device,
                      cudaStream_t stream);

// ------------------------------------------------------------------------------- sort.cu

void sort_touches(void* scratch, size_t bytes, const int64_t* keys, int64_t* sorted_keys,
                  const uint32_t* touches, uint32_t* sorted_touches, int64_t count, int key_bits,
                  cudaStream_t stream);
// numbers[i] becomes the sum of numbers[0 … i].
void running_sum(void* scratch, size_t bytes, uint32_t* numbers, int64_t count,
                 cudaStream_t stream);

}  // namespace cuda
}  // namespace embcompress
