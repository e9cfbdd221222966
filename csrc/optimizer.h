// The optimizers of fused updates: their settings, and what state they keep.

#pragma once

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

}  // namespace embcompress
