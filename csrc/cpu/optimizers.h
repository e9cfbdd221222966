// Updates of touched rows, fused into the backward pass.

#pragma once

#include <algorithm>
#include <cmath>

#include "../optimizer.h"
#include "pooling.h"

namespace embcompress {

// Updates one row of `width` numbers. `first` and `second` are the row's state: Adagrad's sum of
// squares (one number for the row-wise form), Adam's two moments.
EMBCOMPRESS_INLINE void update_row(const Optimizer& optimizer, int64_t width, const float* gradient,
                                   float* row, float* first, float* second) {
    const float rate = optimizer.learning_rate, decay = optimizer.weight_decay;
    const float epsilon = optimizer.epsilon;
    switch (optimizer.kind) {
        case OptimizerKind::kSgd:
            for (int64_t c = 0; c < width; ++c) row[c] -= rate * (gradient[c] + decay * row[c]);
            return;
        case OptimizerKind::kAdagrad:
            for (int64_t c = 0; c < width; ++c) {
                const float g = gradient[c] + decay * row[c];
                first[c] += g * g;
                row[c] -= rate * g / (std::sqrt(first[c]) + epsilon);
            }
            return;
        case OptimizerKind::kRowwiseAdagrad: {
            const float squares = sum_of(width, [&](int64_t c) {
                const float g = gradient[c] + decay * row[c];
                return g * g;
            });
            first[0] += squares / static_cast<float>(width);
            const float scaled = rate / (std::sqrt(first[0]) + epsilon);
            for (int64_t c = 0; c < width; ++c) {
                row[c] -= scaled * (gradient[c] + decay * row[c]);
            }
            return;
        }
        case OptimizerKind::kAdam: {
            const double steps = static_cast<double>(optimizer.step);
            const double bias1 = 1.0 - std::pow(static_cast<double>(optimizer.beta1), steps);
            const double bias2 = 1.0 - std::pow(static_cast<double>(optimizer.beta2), steps);
            const float scaled = static_cast<float>(rate * std::sqrt(bias2) / bias1);
            for (int64_t c = 0; c < width; ++c) {
                const float g = gradient[c] + decay * row[c];
                first[c] += (1.0f - optimizer.beta1) * (g - first[c]);
                second[c] += (1.0f - optimizer.beta2) * (g * g - second[c]);
                row[c] -= scaled * first[c] / (std::sqrt(second[c]) + epsilon);
            }
            return;
        }
    }
}

// A store that is updated: its numbers, and its optimizer's state (nullptr where there is none).
struct Updated {
    Optimizer optimizer;
    int64_t width;
    float* data;
    float* first;
    float* second;

    EMBCOMPRESS_INLINE int64_t state_at(int64_t row) const {
        return row * state_width(optimizer.kind, width);
    }

    EMBCOMPRESS_INLINE void update(int64_t row, const float* gradient) const {
        const int64_t at = state_at(row);
        update_row(optimizer, width, gradient, data + row * width,
                   first == nullptr ? nullptr : first + at,
                   second == nullptr ? nullptr : second + at);
    }

    EMBCOMPRESS_INLINE void prefetch(int64_t row) const {
        const float* numbers = data + row * width;
        for (int64_t c = 0; c < std::min<int64_t>(width, kPrefetchFloats); c += 16) {
            __builtin_prefetch(numbers + c, 1);
        }
        if (first != nullptr) __builtin_prefetch(first + state_at(row), 1);
        if (second != nullptr) __builtin_prefetch(second + state_at(row), 1);
    }
};

}  // namespace embcompress
