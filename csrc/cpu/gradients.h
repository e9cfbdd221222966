// The backward pass: gradients of stores, the same bits for any number of threads.

#pragma once

#include <memory>
#include <vector>

#include "optimizers.h"

namespace embcompress {

// Where the gradient of a store goes: one of the three.
struct GradientSink {
    float* dense = nullptr;            // (rows, width), zero: it is added
    int64_t* rows = nullptr;           // (num_touched,) the touched rows, rising,
    float* values = nullptr;           // (num_touched, width) and their gradients
    const Updated* updated = nullptr;  // the touched rows are updated
};

// Whether the touched rows of every store are counted before `reduce`. Those of a store that must
// wait for its update are counted in any case.
enum class Touches { kCounted, kUncounted };

// Gradients of some stores.
class StoreGradients {
  public:
    // `grad` is float32 of the output's shape; `wanted` are numbers of stores.
    StoreGradients(const Lookup& lookup, const float* grad, const std::vector<int64_t>& wanted,
                   Touches touches, int num_threads);
    ~StoreGradients();

    // Finds the touched rows. False if an id was outside the vocabulary: nothing else may be
    // called then.
    bool prepare();

    // Rows of wanted store number k that have a gradient, where they are counted.
    int64_t num_touched(size_t k) const;

    // Whether wanted store number k may be updated by `reduce`, because what else is added up there
    // does not read it.
    bool may_update(size_t k) const;

    // Adds up the gradients; a sink for each wanted store.
    void reduce(const std::vector<GradientSink>& sinks);

  private:
    struct State;
    std::unique_ptr<State> state_;
};

// Updates rows by gradients that were added up before.
void update_rows(const Updated& store, const int64_t* rows, const float* values, int64_t count,
                 int num_threads);

}  // namespace embcompress
