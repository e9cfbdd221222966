// Updates of rows by a group of lanes: the same formulas as in cpu/optimizers.h.

#pragma once

#include <cmath>

#include "../optimizer.h"
#include "touches.cuh"

namespace embcompress {
namespace cuda {

// The mean over a row of squared gradients, with decay: what row-wise Adagrad adds to its state.
template <int C>
EMBCOMPRESS_DEVICE float sum_of_squares(const OptimizerSettings& optimizer, const Target& target,
                                        int64_t row, int64_t column, const float (&gradient)[C]) {
    float squares = 0.0f;
#pragma unroll
    for (int c = 0; c < C; ++c) {
        if (column + c >= target.width) continue;
        const float value = target.data[row * target.width + column + c];
        const float g = gradient[c] + optimizer.weight_decay * value;
        squares += g * g;
    }
    return squares;
}

// Updates columns [column, column + C) of a row; `state` is the row's new one, row-wise.
template <int C>
EMBCOMPRESS_DEVICE void update_columns(const OptimizerSettings& optimizer, const Target& target,
                                       int64_t row, int64_t column, const float (&gradient)[C],
                                       float state) {
    const OptimizerKind kind = static_cast<OptimizerKind>(optimizer.kind);
    const float rate = optimizer.learning_rate, epsilon = optimizer.epsilon;
#pragma unroll
    for (int c = 0; c < C; ++c) {
        if (column + c >= target.width) continue;
        const int64_t at = row * target.width + column + c;
        const float value = target.data[at];
        const float g = gradient[c] + optimizer.weight_decay * value;
        float step;
        if (kind == OptimizerKind::kSgd) {
            step = rate * g;
        } else if (kind == OptimizerKind::kAdagrad) {
            const float sum = target.first[at] + g * g;
            target.first[at] = sum;
            step = rate * g / (sqrtf(sum) + epsilon);
        } else if (kind == OptimizerKind::kRowwiseAdagrad) {
            step = rate / (sqrtf(state) + epsilon) * g;
        } else {
            const float first =
                target.first[at] + (1.0f - optimizer.beta1) * (g - target.first[at]);
            const float second =
                target.second[at] + (1.0f - optimizer.beta2) * (g * g - target.second[at]);
            target.first[at] = first;
            target.second[at] = second;
            step = target.adam_scale * first / (sqrtf(second) + epsilon);
        }
        target.data[at] = value - step;
    }
}

// Row-wise Adagrad's state of a row after a step, which is stored; other optimizers have none.
EMBCOMPRESS_DEVICE float advance_state(const OptimizerSettings& optimizer, const Group& group,
                                       const Target& target, int64_t row, float squares) {
    if (static_cast<OptimizerKind>(optimizer.kind) != OptimizerKind::kRowwiseAdagrad) return 0.0f;
    const float state = target.first[row] + group.sum(squares) / static_cast<float>(target.width);
    group.sync();  // all have read it
    if (group.lane == 0) target.first[row] = state;
    return state;
}

}  // namespace cuda
}  // namespace embcompress
