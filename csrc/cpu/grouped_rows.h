// Which ids touch which rows of a store, in groups of neighboring rows: what touches the rows of a
// group is together, in the order of the batch, so that their gradients are added up in a cache,
// the same way by any number of threads.

#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "row_numbers.h"
#include "uses.h"

namespace embcompress {

class GroupedRows {
  public:
    // Entries whose rows are [first_row, end_row), of no other group.
    struct Group {
        int64_t begin;
        int64_t end;
        int64_t first_row;
        int64_t end_row;
        int64_t first_touched;  // number of its first touched row, where they are counted

        int64_t size() const { return end - begin; }
        int64_t num_rows() const { return end_row - first_row; }
        int64_t most_touched() const { return std::min(size(), num_rows()); }
    };

    // Groups what the uses touch of a store. False for an id outside the vocabulary. `block` is the
    // caller's own.
    bool group(const Lookup& lookup, const std::vector<Use>& uses, const StoreView& store,
               int num_threads, RowBlock& block);

    // Counts the touched rows of the groups.
    void count_touched(int num_threads);

    int64_t num_touched() const { return num_touched_; }
    const std::vector<Group>& groups() const { return groups_; }

    // Numbers the touched rows of a group; calls f(number, row) for each, as they rise. How many
    // they are.
    template <typename F>
    EMBCOMPRESS_INLINE int64_t number_rows(const Group& group, RowNumbers& numbers,
                                           const F& f) const {
        for (int64_t at = group.begin; at < group.end; ++at) {
            numbers.mark(row(at) - group.first_row);
        }
        return numbers.finish(group.num_rows(), [&](int64_t number, int64_t offset) {
            f(number, group.first_row + offset);
        });
    }

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
    bool fill_buckets(const Chunks& chunks, RowBlock& block, std::vector<int64_t>& bounds);
    void split(const Group& group, int bits, std::vector<uint64_t>& room,
               std::vector<Group>& parts);

    std::unique_ptr<uint64_t[]> keys_;  // row, use, position, from high bits to low ones
    int64_t total_ = 0;                 // ids of all uses, also those that touch nothing
    int64_t num_touched_ = 0;
    int64_t width_ = 0;
    int position_bits_ = 0, row_shift_ = 0, row_bits_ = 0, bucket_bits_ = 0;
    uint64_t use_mask_ = 0, position_mask_ = 0;
    std::vector<Group> groups_;
};

// More entries of one row than this are added up in pieces.
constexpr int64_t kHugeRow = 16384;

}  // namespace embcompress
