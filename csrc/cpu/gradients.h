// Where the gradient of a store's rows is added up.

#pragma once

#include <algorithm>
#include <cstring>

#include "lookup.h"

namespace embcompress {

// Rows are dealt to partitions; a partition belongs to one thread at a time and sees its rows in
// the order of the ids, so sums do not depend on the number of threads.
EMBCOMPRESS_INLINE int partition_of(int64_t row, int partitions) {
    const uint32_t mixed = static_cast<uint32_t>(row) * 2654435769u;
    return static_cast<int>((static_cast<uint64_t>(mixed) * static_cast<uint32_t>(partitions)) >>
                            32);
}

// Gradient rows of one partition that were touched, in order of first touch.
class TouchedRows {
  public:
    // `most` rows are expected at most. Room for them is memory only where it is used; growing
    // would hold the values twice.
    void start(int64_t width, int64_t most) {
        width_ = width;
        rows_.reserve(most);
        values_.reserve(most * width);
        const int64_t expected = std::min<int64_t>(most, 1 << 16);
        size_t slots = 64;
        while (static_cast<int64_t>(slots) < 2 * expected) slots *= 2;
        slots_.assign(slots, -1);
    }

    // Gradient of the row, zero at first; valid until the next call.
    EMBCOMPRESS_INLINE float* at(int64_t row) {
        size_t slot = mix64(static_cast<uint64_t>(row)) & (slots_.size() - 1);
        while (slots_[slot] >= 0) {
            if (rows_[slots_[slot]] == row) return values_.data() + slots_[slot] * width_;
            slot = (slot + 1) & (slots_.size() - 1);
        }
        return insert(slot, row);
    }

    const std::vector<int64_t>& rows() const { return rows_; }
    const float* values() const { return values_.data(); }

  private:
    float* insert(size_t slot, int64_t row) {
        const int64_t number = static_cast<int64_t>(rows_.size());
        slots_[slot] = number;
        rows_.push_back(row);
        values_.resize((number + 1) * width_, 0.0f);
        if (2 * rows_.size() > slots_.size()) grow();
        return values_.data() + number * width_;
    }

    void grow() {
        slots_.assign(slots_.size() * 2, -1);
        for (size_t number = 0; number < rows_.size(); ++number) {
            size_t slot = mix64(static_cast<uint64_t>(rows_[number])) & (slots_.size() - 1);
            while (slots_[slot] >= 0) slot = (slot + 1) & (slots_.size() - 1);
            slots_[slot] = static_cast<int64_t>(number);
        }
    }

    int64_t width_ = 0;
    std::vector<int64_t> rows_;
    std::vector<int64_t> slots_;
    std::vector<float> values_;
};

// The gradient of one store: a dense float32 tensor, or its touched rows by partition.
struct GradientSink {
    float* dense = nullptr;
    int64_t width = 0;
    std::vector<TouchedRows> touched;
};

}  // namespace embcompress
