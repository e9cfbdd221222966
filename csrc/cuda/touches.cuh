// Touches: what the gradient of a store's row is made of. Touch e of a batch of N ids is that of
// the id at position e % N through use e / N of its feature.

#pragma once

#include "gather.cuh"
#include "kernels.h"

namespace embcompress {
namespace cuda {

constexpr int kColumns = 4;  // of a lane
constexpr int64_t kNone = -1;

// Arrays of a backward pass in its workspace.
struct Arrays {
    int* failed;
    uint32_t* bags;
    float* coefficients;
    float* scalars;
    int64_t* keys;
    uint32_t* touches;
    int64_t* sorted_keys;
    uint32_t* sorted_touches;
    int64_t* segments;
    uint32_t* flags;
    int64_t* unique_keys;
    int64_t* num_segments;
    int64_t* bounds;
    float* values;

    __host__ __device__ Arrays(unsigned char* memory, const BackwardLayout& layout)
        : failed(reinterpret_cast<int*>(memory + layout.failed)),
          bags(reinterpret_cast<uint32_t*>(memory + layout.bags)),
          coefficients(reinterpret_cast<float*>(memory + layout.coefficients)),
          scalars(reinterpret_cast<float*>(memory + layout.scalars)),
          keys(reinterpret_cast<int64_t*>(memory + layout.keys)),
          touches(reinterpret_cast<uint32_t*>(memory + layout.touches)),
          sorted_keys(reinterpret_cast<int64_t*>(memory + layout.sorted_keys)),
          sorted_touches(reinterpret_cast<uint32_t*>(memory + layout.sorted_touches)),
          segments(reinterpret_cast<int64_t*>(memory + layout.segments)),
          flags(reinterpret_cast<uint32_t*>(memory + layout.flags)),
          unique_keys(reinterpret_cast<int64_t*>(memory + layout.unique_keys)),
          num_segments(reinterpret_cast<int64_t*>(memory + layout.num_segments)),
          bounds(reinterpret_cast<int64_t*>(memory + layout.bounds)),
          values(reinterpret_cast<float*>(memory + layout.values)) {}
};

// What the kernels of a backward pass are given, beside the plan.
struct BackwardArguments {
    Inputs inputs;
    BackwardLayout layout;
    KeyShape key;
    OptimizerSettings optimizer;
    const float* gradient;
    unsigned char* workspace;
    int64_t num_bags;
    SinkKind sink;

    explicit BackwardArguments(const Backward& backward)
        : inputs(backward.inputs),
          layout(backward.layout),
          key(backward.key),
          optimizer(backward.optimizer),
          gradient(backward.gradient),
          workspace(backward.workspace),
          num_bags(backward.num_bags),
          sink(backward.sink) {}

    EMBCOMPRESS_DEVICE int64_t target_of(int64_t key_) const { return key_ >> key.row_bits; }
    EMBCOMPRESS_DEVICE int64_t row_in(int64_t key_) const {
        return key_ & ((int64_t{1} << key.row_bits) - 1);
    }
};

// The output's gradient for a feature of a bag.
EMBCOMPRESS_DEVICE const float* gradient_of(const BackwardArguments& arguments,
                                            const BoundFeature& feature, int64_t bag) {
    return arguments.gradient + bag % arguments.inputs.batch * arguments.inputs.num_columns +
           feature.out_column;
}

// What multiplies the gradients of the step and bias of latents: 1 / sqrt(N * (2^bits - 1)), N
// numbers to a step (Esser et al., "Learned step size quantization", section 2.2).
EMBCOMPRESS_DEVICE float damping(const BoundProbe& bound) {
    const StoreView& step = bound.steps()->step;
    const int64_t numbers = (bound.store.rows / step.rows) * (bound.store.width / step.width);
    const int64_t last = (int64_t{1} << bound.bits) - 1;
    return static_cast<float>(1.0 / sqrt(static_cast<double>(numbers * last)));
}

// Derivative of a number of a packed or latent row by its step or bias.
EMBCOMPRESS_DEVICE float step_factor(const BoundProbe& bound, Role role, int64_t row,
                                     int64_t column) {
    const bool has_bias = bound.steps()->has_bias;
    const float zero = has_bias ? 0.0f : static_cast<float>((1 << bound.bits) - 1) / 2;
    const float stored = stored_number(bound, row, column);
    if (!is_latent(bound)) return role == Role::kBias ? 1.0f : stored - zero;
    const Latent<float> latent = latent_of(bound, row, column, stored);
    const float factor =
        role == Role::kBias ? derivative_by_bias(latent) : derivative_by_step(latent, zero);
    return factor * damping(bound);
}

// Whether a use's gradient is one number: a dot product over the columns.
EMBCOMPRESS_DEVICE bool is_scalar(const Use& use, const BoundProbe& bound) {
    if (use.role == Role::kRows) return false;
    return use.role == Role::kScale || !bound.steps()->per_column;
}

// Row of a wanted store that a checked id touches; negative: none.
EMBCOMPRESS_DEVICE int64_t touched_row(const Use& use, const BoundProbe& bound, int64_t id) {
    if (use.role == Role::kScale) return scale_row(*bound.scale(), id);
    const int64_t row = probe_row(bound, id);
    const bool shared = use.role != Role::kRows && !bound.steps()->per_row;
    return row >= 0 && shared ? 0 : row;
}

}  // namespace cuda
}  // namespace embcompress
