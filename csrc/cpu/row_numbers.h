// The rows that some ids touch, numbered as they rise: a bit for every row of a range.

#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "vectors.h"

namespace embcompress {

constexpr int64_t words_of(int64_t bits) { return (bits + 63) / 64; }

class RowNumbers {
  public:
    // Of a range: its bits and the numbers of its words stay in the second-level cache.
    static constexpr int64_t kMostRows = 1 << 18;

    // Marks row number `offset` of the range.
    EMBCOMPRESS_INLINE void mark(int64_t offset) {
        const int64_t word = offset / 64;
        touched_words_[word / 64] |= 1ULL << (word % 64);
        words_[word] |= 1ULL << (offset % 64);
    }

    // Numbers the marked rows of a range of `range` rows; calls f(number, offset) for each, as they
    // rise. How many they are.
    template <typename F>
    EMBCOMPRESS_INLINE int64_t finish(int64_t range, const F& f) {
        int64_t count = 0;
        for_each_word(range, [&](int64_t word) {
            before_[word] = static_cast<uint32_t>(count);
            for (uint64_t bits = words_[word]; bits != 0; bits &= bits - 1) {
                f(count++, word * 64 + __builtin_ctzll(bits));
            }
        });
        return count;
    }

    // The number of a marked row.
    EMBCOMPRESS_INLINE int64_t number(int64_t offset) const {
        const uint64_t below = (1ULL << (offset % 64)) - 1;
        return before_[offset / 64] + __builtin_popcountll(words_[offset / 64] & below);
    }

    // Takes all marks of a range away.
    EMBCOMPRESS_INLINE void clear(int64_t range) {
        for_each_word(range, [&](int64_t word) { words_[word] = 0; });
        std::fill(touched_words_, touched_words_ + words_of(words_of(range)), 0);
    }

  private:
    static constexpr int64_t kWords = words_of(kMostRows);

    // Calls f(word) for every word that has a mark.
    template <typename F>
    EMBCOMPRESS_INLINE void for_each_word(int64_t range, const F& f) const {
        for (int64_t k = 0; k < words_of(words_of(range)); ++k) {
            for (uint64_t bits = touched_words_[k]; bits != 0; bits &= bits - 1) {
                f(k * 64 + __builtin_ctzll(bits));
            }
        }
    }

    std::unique_ptr<uint64_t[]> words_{new uint64_t[kWords]()};
    std::unique_ptr<uint32_t[]> before_{new uint32_t[kWords]};  // marked rows before each word
    uint64_t touched_words_[words_of(kWords)] = {};
};

}  // namespace embcompress
