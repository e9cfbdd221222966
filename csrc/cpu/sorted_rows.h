// Which ids touch which row of a store, sorted by rows: the ids of one row are neighbors, in the
// order of the batch, so its gradient is added up in one go, the same way by any number of threads.

#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "uses.h"

namespace embcompress {

class SortedRows {
  public:
    // Some entries, of which none of another task has the row.
    struct Task {
        int64_t begin;
        int64_t end;
        int64_t first_row;  // number of its first row among all touched ones
    };

    // Sorts what the uses touch of a store of so many rows. False for an id outside the
    // vocabulary. `block` is the caller's own.
    bool sort(const Lookup& lookup, const std::vector<Use>& uses, int64_t num_rows, int num_threads,
              RowBlock& block);

    int64_t num_touched() const { return num_touched_; }
    const std::vector<Task>& tasks() const { return tasks_; }

    // Of entry number `at`: the row, the number of the use, and the position among the ids of the
    // use's feature.
    int64_t row(int64_t at) const { return static_cast<int64_t>(keys_[at] >> row_shift_); }
    int64_t use(int64_t at) const {
        return static_cast<int64_t>((keys_[at] >> position_bits_) & use_mask_);
    }
    int64_t position(int64_t at) const { return static_cast<int64_t>(keys_[at] & position_mask_); }

  private:
    struct Chunks;
    void choose_bits(const Lookup& lookup, const std::vector<Use>& uses, int64_t num_rows);
    void sort_bucket(int64_t begin, int64_t end, std::vector<uint64_t>& room);
    void make_tasks(const std::vector<int64_t>& bounds, const std::vector<int64_t>& touched);
    void cut(int64_t begin, int64_t end);

    std::unique_ptr<uint64_t[]> keys_;  // row, use, position, from high bits to low ones
    int64_t total_ = 0;                 // ids of all uses, also those that touch nothing
    int64_t num_touched_ = 0;
    int position_bits_ = 0, row_shift_ = 0, row_bits_ = 0, bucket_bits_ = 0;
    uint64_t use_mask_ = 0, position_mask_ = 0;
    std::vector<Task> tasks_;
};

// More entries of one row than this are a task of their own, to be cut into pieces.
constexpr int64_t kHugeRow = 16384;

}  // namespace embcompress
