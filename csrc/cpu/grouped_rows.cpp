// One pass by the high bits of the rows into buckets; those of too many rows or entries are split.

#include "grouped_rows.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace embcompress {
namespace {

// Below this many ids a thread costs more than it gives.
constexpr int64_t kIdsPerThread = 4096;
constexpr int64_t kIdsPerBucket = 512;
// Each bucket is written at its own place: with more of them these do not stay in the first-level
// cache.
constexpr int kMostBucketBits = 9;
// Groups are about as large as this; larger ones than the most are split.
constexpr int64_t kEntriesPerGroup = 1024;
constexpr int64_t kMostEntries = 4096;
// Numbers of the touched rows of a group: they stay in the second-level cache.
constexpr int64_t kMostNumbers = 1 << 16;
constexpr int kRadixBits = 8;

int threads_for(int64_t num_ids, int num_threads) {
    return static_cast<int>(
        std::clamp<int64_t>(num_ids / kIdsPerThread, 1, std::max(num_threads, 1)));
}

int bits_for(uint64_t count) {  // of the numbers below count
    int bits = 0;
    while (bits < 64 && (count - 1) >> bits != 0) ++bits;
    return count <= 1 ? 0 : bits;
}

// Calls f(position among the feature's ids, row) for ids [begin, end) of a use that touch a row.
template <typename F>
EMBCOMPRESS_INLINE bool for_each_row(const Lookup& lookup, const Use& use, int64_t begin,
                                     int64_t end, RowBlock& block, const F& f) {
    const int64_t first = ids_of(lookup, use.feature).begin;
    block.use(lookup.features[use.feature]);
    int64_t rows[kBlock];
    bool valid = true;
    for (int64_t position = begin; position < end; position += kBlock) {
        const int n = static_cast<int>(std::min<int64_t>(kBlock, end - position));
        valid &= touched_rows(lookup, use, first + position, n, block, rows);
        for (int i = 0; i < n; ++i) {
            if (rows[i] >= 0) f(position + i, rows[i]);
        }
    }
    return valid;
}

EMBCOMPRESS_CLONES bool count_rows(const Lookup& lookup, const Use& use, int64_t begin, int64_t end,
                                   RowBlock& block, int shift, int64_t* counts) {
    return for_each_row(lookup, use, begin, end, block,
                        [&](int64_t, int64_t row) { ++counts[row >> shift]; });
}

struct KeyBits {
    uint64_t use;  // shifted already
    int row_shift;
    int bucket_shift;
};

EMBCOMPRESS_CLONES bool scatter_rows(const Lookup& lookup, const Use& use, int64_t begin,
                                     int64_t end, RowBlock& block, KeyBits bits, int64_t* places,
                                     uint64_t* keys) {
    return for_each_row(lookup, use, begin, end, block, [&](int64_t position, int64_t row) {
        keys[places[row >> bits.bucket_shift]++] = static_cast<uint64_t>(row) << bits.row_shift |
                                                   bits.use | static_cast<uint64_t>(position);
    });
}

// By `bits` bits from `shift` on, in place; keeps the order of equal ones. `ends` is where the
// entries of each digit end.
void radix_pass(uint64_t* keys, uint64_t* room, int64_t count, int shift, int bits,
                int64_t (&ends)[1 << kRadixBits]) {
    std::fill(std::begin(ends), std::end(ends), 0);
    const uint64_t mask = (1ULL << bits) - 1;
    for (int64_t i = 0; i < count; ++i) ++ends[(keys[i] >> shift) & mask];
    int64_t sum = 0;
    for (uint64_t digit = 0; digit <= mask; ++digit) {
        const int64_t own = ends[digit];
        ends[digit] = sum;
        sum += own;
    }
    for (int64_t i = 0; i < count; ++i) room[ends[(keys[i] >> shift) & mask]++] = keys[i];
    std::memcpy(keys, room, count * sizeof(uint64_t));
}

// Whether the gradients of a group's rows, of so many columns, are added up in a cache.
bool is_small(const GroupedRows::Group& group, int64_t width) {
    return group.size() <= kMostEntries && group.num_rows() <= RowNumbers::kMostRows &&
           group.most_touched() * width <= kMostNumbers;
}

// Appends the next group, to the one before where they are one group's size together.
void append(std::vector<GroupedRows::Group>& groups, const GroupedRows::Group& next,
            int64_t width) {
    if (next.size() == 0) return;
    if (!groups.empty() && groups.back().size() < kEntriesPerGroup) {
        GroupedRows::Group both = groups.back();
        both.end = next.end;
        both.end_row = next.end_row;
        if (is_small(both, width)) {
            groups.back() = both;
            return;
        }
    }
    groups.push_back(next);
}

EMBCOMPRESS_CLONES int64_t count_rows_of(const GroupedRows& grouped,
                                         const GroupedRows::Group& group, RowNumbers& numbers) {
    const int64_t count = grouped.number_rows(group, numbers, [](int64_t, int64_t) {});
    numbers.clear(group.num_rows());
    return count;
}

}  // namespace

// The ids of all uses in a row, cut evenly: a chunk is worked on by one thread.
struct GroupedRows::Chunks {
    const Lookup& lookup;
    const std::vector<Use>& uses;
    int64_t total;
    int count;

    // Calls f(number of the chunk, block) for every chunk, in parallel where there are several.
    template <typename F>
    void for_each(RowBlock& block, const F& f) const {
        if (count == 1) return f(0, block);
        parallel(count, [&](int chunk) {
            RowBlock own(lookup);
            f(chunk, own);
        });
    }

    // Calls f(number of the use, use, begin, end) for the ids of a chunk.
    template <typename F>
    void visit(int chunk, const F& f) const {
        const int64_t begin = total * chunk / count, end = total * (chunk + 1) / count;
        int64_t first = 0;
        for (size_t u = 0; u < uses.size() && first < end; ++u) {
            const int64_t size = ids_of(lookup, uses[u].feature).size();
            const int64_t from = std::max(begin, first), to = std::min(end, first + size);
            if (from < to) f(u, uses[u], from - first, to - first);
            first += size;
        }
    }
};

void GroupedRows::choose_bits(const Lookup& lookup, const std::vector<Use>& uses,
                              int64_t num_rows) {
    int64_t longest = 1;
    for (const Use& use : uses) {
        const int64_t size = ids_of(lookup, use.feature).size();
        longest = std::max(longest, size);
        total_ += size;
    }
    position_bits_ = bits_for(static_cast<uint64_t>(longest));
    const int use_bits = bits_for(uses.size());
    row_bits_ = bits_for(static_cast<uint64_t>(num_rows));
    row_shift_ = position_bits_ + use_bits;
    if (row_shift_ + row_bits_ > 64) {
        throw std::runtime_error(
            "the batch and the store are too large for one backward pass: "
            "split the batch");
    }
    use_mask_ = (1ULL << use_bits) - 1;
    position_mask_ = position_bits_ == 64 ? ~0ULL : (1ULL << position_bits_) - 1;
    bucket_bits_ = std::min(
        {bits_for(static_cast<uint64_t>(total_ / kIdsPerBucket + 1)), kMostBucketBits, row_bits_});
}

// Entries by the high bits of their rows; `bounds` are where the buckets begin, and the end.
bool GroupedRows::fill_buckets(const Chunks& chunks, RowBlock& block,
                               std::vector<int64_t>& bounds) {
    const int64_t buckets = 1LL << bucket_bits_;
    const int shift = row_bits_ - bucket_bits_;
    std::vector<int64_t> places(chunks.count * buckets);
    std::atomic<bool> valid{true};
    chunks.for_each(block, [&](int chunk, RowBlock& block) {
        chunks.visit(chunk, [&](size_t, const Use& use, int64_t begin, int64_t end) {
            int64_t* counts = places.data() + chunk * buckets;
            if (!count_rows(chunks.lookup, use, begin, end, block, shift, counts)) valid = false;
        });
    });
    if (!valid) return false;
    int64_t sum = 0;
    for (int64_t bucket = 0; bucket < buckets; ++bucket) {
        bounds.push_back(sum);
        for (int chunk = 0; chunk < chunks.count; ++chunk) {
            const int64_t own = places[chunk * buckets + bucket];
            places[chunk * buckets + bucket] = sum;
            sum += own;
        }
    }
    bounds.push_back(sum);
    keys_.reset(new uint64_t[sum]);
    chunks.for_each(block, [&](int chunk, RowBlock& block) {
        chunks.visit(chunk, [&](size_t u, const Use& use, int64_t begin, int64_t end) {
            const KeyBits bits{static_cast<uint64_t>(u) << position_bits_, row_shift_, shift};
            scatter_rows(chunks.lookup, use, begin, end, block, bits,
                         places.data() + chunk * buckets, keys_.get());
        });
    });
    return true;
}

bool GroupedRows::group(const Lookup& lookup, const std::vector<Use>& uses, const StoreView& store,
                        int num_threads, RowBlock& block) {
    width_ = store.width;
    choose_bits(lookup, uses, store.rows);
    const Chunks chunks{lookup, uses, total_, threads_for(total_, num_threads)};
    std::vector<int64_t> bounds;
    if (!fill_buckets(chunks, block, bounds)) return false;
    const int64_t buckets = 1LL << bucket_bits_;
    const int bits = row_bits_ - bucket_bits_;
    const auto bucket = [&](int64_t b) {
        return Group{bounds[b], bounds[b + 1], b << bits, (b + 1) << bits, 0};
    };
    std::vector<int64_t> large;
    for (int64_t b = 0; b < buckets; ++b) {
        if (bucket(b).size() > 0 && !is_small(bucket(b), width_)) large.push_back(b);
    }
    std::vector<std::vector<Group>> parts(large.size());
    std::atomic<size_t> next{0};
    parallel(static_cast<int>(std::min<int64_t>(chunks.count, large.size())), [&](int) {
        std::vector<uint64_t> room;
        for (size_t k = next++; k < large.size(); k = next++) {
            split(bucket(large[k]), bits, room, parts[k]);
        }
    });
    size_t k = 0;
    for (int64_t b = 0; b < buckets; ++b) {
        if (k < large.size() && large[k] == b) {
            for (const Group& part : parts[k]) append(groups_, part, width_);
            ++k;
        } else {
            append(groups_, bucket(b), width_);
        }
    }
    return true;
}

// Into parts by the highest of the `bits` bits in which the rows of a group differ.
void GroupedRows::split(const Group& group, int bits, std::vector<uint64_t>& room,
                        std::vector<Group>& parts) {
    if (group.size() == 0) return;
    if (is_small(group, width_) || group.num_rows() == 1) return append(parts, group, width_);
    const int own = std::min(bits, kRadixBits), left = bits - own;
    if (static_cast<int64_t>(room.size()) < group.size()) room.resize(group.size());
    int64_t ends[1 << kRadixBits];
    radix_pass(keys_.get() + group.begin, room.data(), group.size(), row_shift_ + left, own, ends);
    Group part{group.begin, group.begin, group.first_row, group.first_row, 0};
    for (int64_t digit = 0; digit < 1LL << own; ++digit) {
        part.begin = part.end;
        part.end = group.begin + ends[digit];
        part.first_row = part.end_row;
        part.end_row += 1LL << left;
        split(part, left, room, parts);
    }
}

void GroupedRows::count_touched(int num_threads) {
    const int64_t count = static_cast<int64_t>(groups_.size());
    std::atomic<int64_t> next{0};
    parallel(threads_for(total_, num_threads), [&](int) {
        RowNumbers numbers;
        for (int64_t k = next++; k < count; k = next++) {
            groups_[k].first_touched = count_rows_of(*this, groups_[k], numbers);
        }
    });
    for (Group& group : groups_) {
        const int64_t own = group.first_touched;
        group.first_touched = num_touched_;
        num_touched_ += own;
    }
}

}  // namespace embcompress
