// Updates of touched rows, fused into the backward pass.

#pragma once

#include <cmath>
#include <cstdint>

namespace embcompress {

enum class OptimizerKind : int64_t { kSgd = 0, kAdagrad = 1, kRowwiseAdagrad = 2, kAdam = 3 };

struct Optimizer {
    OptimizerKind kind;
    float learning_rate;
    float epsilon;
    float weight_decay;
    float beta1;
    float beta2;
    int64_t step;  // of Adam, from 1
};

// What state an optimizer keeps of a store: one or two tensors, as wide as the store or one number
// a row.
inline bool has_first(OptimizerKind kind) { return kind != OptimizerKind::kSgd; }
inline bool has_second(OptimizerKind kind) { return kind == OptimizerKind::kAdam; }
inline int64_t state_width(OptimizerKind kind, int64_t width) {
    return kind == OptimizerKind::kRowwiseAdagrad ? 1 : width;
}

// Updates one row of `width` numbers. `first` and `second` are the row's state: Adagrad's sum of
// squares (one number for the row-wise form), Adam's two moments.
inline void update_row(const Optimizer& optimizer, int64_t width, const float* gradient, float* row,
                       float* first, float* second) {
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
            float squares = 0.0f;
            for (int64_t c = 0; c < width; ++c) {
                const float g = gradient[c] + decay * row[c];
                squares += g * g;
            }
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

}  // namespace embcompress
