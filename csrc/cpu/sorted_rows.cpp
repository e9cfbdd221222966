// One pass by the high bits of the rows into buckets that fit a cache, then every bucket by itself.

#include "sorted_rows.h"

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
constexpr int64_t kEntriesPerTask = 1024;
constexpr int kRadixBits = 8;
// Fewer entries than this are sorted by insertion.
constexpr int64_t kFew = 48;

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

void insertion_sort(uint64_t* keys, int64_t count) {
    for (int64_t i = 1; i < count; ++i) {
        const uint64_t key = keys[i];
        int64_t at = i;
        for (; at > 0 && keys[at - 1] > key; --at) keys[at] = keys[at - 1];
        keys[at] = key;
    }
}

// By `bits` bits from `shift` on; keeps the order of equal ones.
void radix_pass(const uint64_t* from, uint64_t* to, int64_t count, int shift, int bits) {
    int64_t places[1 << kRadixBits] = {};
    const uint64_t mask = (1ULL << bits) - 1;
    for (int64_t i = 0; i < count; ++i) ++places[(from[i] >> shift) & mask];
    int64_t sum = 0;
    for (uint64_t digit = 0; digit <= mask; ++digit) {
        const int64_t own = places[digit];
        places[digit] = sum;
        sum += own;
    }
    for (int64_t i = 0; i < count; ++i) to[places[(from[i] >> shift) & mask]++] = from[i];
}

}  // namespace

// The ids of all uses in a row, cut evenly: a chunk is worked on by one thread.
struct SortedRows::Chunks {
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

void SortedRows::choose_bits(const Lookup& lookup, const std::vector<Use>& uses, int64_t num_rows) {
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

bool SortedRows::sort(const Lookup& lookup, const std::vector<Use>& uses, int64_t num_rows,
                      int num_threads, RowBlock& block) {
    choose_bits(lookup, uses, num_rows);
    const Chunks chunks{
        lookup, uses, total_,
        static_cast<int>(std::clamp<int64_t>(total_ / kIdsPerThread, 1, std::max(num_threads, 1)))};
    const int64_t buckets = 1LL << bucket_bits_;
    const int shift = row_bits_ - bucket_bits_;
    std::vector<int64_t> places(chunks.count * buckets);
    std::atomic<bool> valid{true};
    chunks.for_each(block, [&](int chunk, RowBlock& block) {
        chunks.visit(chunk, [&](size_t, const Use& use, int64_t begin, int64_t end) {
            int64_t* counts = places.data() + chunk * buckets;
            if (!count_rows(lookup, use, begin, end, block, shift, counts)) valid = false;
        });
    });
    if (!valid) return false;
    std::vector<int64_t> bounds(buckets + 1);
    int64_t sum = 0;
    for (int64_t bucket = 0; bucket < buckets; ++bucket) {
        bounds[bucket] = sum;
        for (int chunk = 0; chunk < chunks.count; ++chunk) {
            const int64_t own = places[chunk * buckets + bucket];
            places[chunk * buckets + bucket] = sum;
            sum += own;
        }
    }
    bounds[buckets] = sum;
    keys_.reset(new uint64_t[sum]);
    chunks.for_each(block, [&](int chunk, RowBlock& block) {
        chunks.visit(chunk, [&](size_t u, const Use& use, int64_t begin, int64_t end) {
            const KeyBits bits{static_cast<uint64_t>(u) << position_bits_, row_shift_, shift};
            scatter_rows(lookup, use, begin, end, block, bits, places.data() + chunk * buckets,
                         keys_.get());
        });
    });
    std::vector<int64_t> touched(buckets);
    std::atomic<int64_t> next{0};
    parallel(std::min<int>(chunks.count, static_cast<int>(buckets)), [&](int) {
        std::vector<uint64_t> room;
        for (int64_t b = next++; b < buckets; b = next++) {
            sort_bucket(bounds[b], bounds[b + 1], room);
            for (int64_t at = bounds[b]; at < bounds[b + 1]; ++at) {
                touched[b] += at == bounds[b] || row(at) != row(at - 1);
            }
        }
    });
    make_tasks(bounds, touched);
    return true;
}

// Only the bits of the row below the bucket's are left to sort by: entries of one row are in order.
void SortedRows::sort_bucket(int64_t begin, int64_t end, std::vector<uint64_t>& room) {
    const int64_t count = end - begin;
    uint64_t* keys = keys_.get() + begin;
    if (count <= kFew) return insertion_sort(keys, count);
    const int bits = row_bits_ - bucket_bits_;
    if (bits == 0) return;
    const int passes = (bits + kRadixBits - 1) / kRadixBits;
    if (static_cast<int64_t>(room.size()) < count) room.resize(count);
    uint64_t* from = keys;
    uint64_t* to = room.data();
    for (int pass = 0, done = 0; pass < passes; ++pass) {
        const int own = (bits - done) / (passes - pass);
        radix_pass(from, to, count, row_shift_ + done, own);
        std::swap(from, to);
        done += own;
    }
    if (from != keys) std::memcpy(keys, from, count * sizeof(uint64_t));
}

// Tasks of about kEntriesPerTask entries, cut where a row ends.
void SortedRows::make_tasks(const std::vector<int64_t>& bounds,
                            const std::vector<int64_t>& touched) {
    int64_t begin = 0, first_row = 0;
    const auto flush = [&](int64_t end) {
        if (end > begin) tasks_.push_back({begin, end, first_row});
        first_row = num_touched_;
        begin = end;
    };
    for (size_t b = 0; b + 1 < bounds.size(); ++b) {
        if (bounds[b + 1] - bounds[b] > 2 * kEntriesPerTask) {
            flush(bounds[b]);
            cut(bounds[b], bounds[b + 1]);
            begin = bounds[b + 1];
            first_row = num_touched_ += touched[b];
            continue;
        }
        num_touched_ += touched[b];
        if (bounds[b + 1] - begin >= kEntriesPerTask) flush(bounds[b + 1]);
    }
    flush(bounds.back());
}

// Cuts a large bucket; a huge row is alone in its task.
void SortedRows::cut(int64_t begin, int64_t end) {
    int64_t number = num_touched_, task_row = number, task = begin;
    for (int64_t at = begin; at < end; ++number) {
        int64_t next = at + 1;
        while (next < end && row(next) == row(at)) ++next;
        if (next - at > kHugeRow && at > task) {
            tasks_.push_back({task, at, task_row});
            task = at, task_row = number;
        }
        if (next - task >= kEntriesPerTask) {
            tasks_.push_back({task, next, task_row});
            task = next, task_row = number + 1;
        }
        at = next;
    }
    if (end > task) tasks_.push_back({task, end, task_row});
}

}  // namespace embcompress
