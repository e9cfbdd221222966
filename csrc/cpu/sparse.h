// Rows of sparse stores as float32: of latents under a mask, or of the numbers that are kept.

#pragma once

#include <algorithm>
#include <cstring>

#include "lookup.h"

namespace embcompress {

inline bool is_sparse(const Probe& probe) { return probe.sparsity.form != SparsityForm::kNone; }

// Whether a sparse store is in training: dense latents, with their mask in the place of the index.
inline bool is_masked(const Lookup& lookup, const Probe& probe) {
    return is_sparse(probe) && lookup.stores[probe.store].width > 0;
}

// 64 bits of a stream from a bit on; zeros past its end.
EMBCOMPRESS_INLINE uint64_t load_bits(const StoreView& store, int64_t bit) {
    const int64_t byte = bit >> 3;
    const int shift = static_cast<int>(bit & 7);
    const uint8_t* stream = static_cast<const uint8_t*>(store.data) + byte;
    uint64_t bits = 0;
    if (byte + 9 <= store.bytes) {
        std::memcpy(&bits, stream, 8);
        return shift == 0 ? bits : bits >> shift | static_cast<uint64_t>(stream[8]) << (64 - shift);
    }
    for (int64_t k = 0; k < 8 && byte + k < store.bytes; ++k) {
        bits |= static_cast<uint64_t>(stream[k]) << (8 * k);
    }
    return bits >> shift;
}

// The lowest `count` bits, all for 64 and more.
EMBCOMPRESS_INLINE uint64_t lowest_bits(int64_t count) {
    return count >= 64 ? ~0ULL : (1ULL << count) - 1;
}

EMBCOMPRESS_INLINE int64_t count_bits(const StoreView& store, int64_t begin, int64_t end) {
    int64_t count = 0;
    for (int64_t bit = begin; bit < end; bit += 64) {
        count += __builtin_popcountll(load_bits(store, bit) & lowest_bits(end - bit));
    }
    return count;
}

// How many numbers are kept before a block.
EMBCOMPRESS_INLINE int64_t start_of(const Lookup& lookup, const Sparsity& sparsity, int64_t block) {
    const StoreView& starts = lookup.stores[sparsity.starts_store];
    return unpack_bits(static_cast<const uint8_t*>(starts.data), starts.bytes, block,
                       sparsity.starts_bits);
}

// Calls f(column) for the set bits of a row of a mask, from the left, until it returns false.
template <typename F>
EMBCOMPRESS_INLINE void for_each_kept(const StoreView& mask, int64_t row, int64_t width,
                                      const F& f) {
    for (int64_t c = 0; c < width; c += 64) {
        uint64_t bits = load_bits(mask, row * width + c) & lowest_bits(width - c);
        for (; bits != 0; bits &= bits - 1) {
            if (!f(c + __builtin_ctzll(bits))) return;
        }
    }
}

// Indices and starts may be damaged: what points past the kept numbers is zero.
EMBCOMPRESS_INLINE void expand_by_mask(const Lookup& lookup, const Probe& probe, int64_t row,
                                       float* out) {
    const Sparsity& sparsity = probe.sparsity;
    const StoreView& store = lookup.stores[probe.store];
    const StoreView& mask = lookup.stores[sparsity.index_store];
    const int64_t block = row / sparsity.block;
    int64_t next = start_of(lookup, sparsity, block) +
                   count_bits(mask, block * sparsity.block * probe.width, row * probe.width);
    for_each_kept(mask, row, probe.width, [&](int64_t column) {
        if (next >= sparsity.stored) return false;
        out[column] = load_float(store.data, store.dtype, next++);
        return true;
    });
}

EMBCOMPRESS_INLINE void expand_by_positions(const Lookup& lookup, const Probe& probe, int64_t row,
                                            float* out) {
    const Sparsity& sparsity = probe.sparsity;
    const StoreView& store = lookup.stores[probe.store];
    const StoreView& index = lookup.stores[sparsity.index_store];
    const auto position = [&](int64_t number) {
        return static_cast<int64_t>(unpack_bits(static_cast<const uint8_t*>(index.data),
                                                index.bytes, number, sparsity.index_bits));
    };
    const int64_t block = row / sparsity.block, blocks = (sparsity.rows - 1) / sparsity.block + 1;
    const int64_t first = (row - block * sparsity.block) * probe.width;
    const int64_t end = block + 1 < blocks
                            ? std::min(start_of(lookup, sparsity, block + 1), sparsity.stored)
                            : sparsity.stored;
    int64_t low = std::min(start_of(lookup, sparsity, block), end);
    for (int64_t high = end; low < high;) {
        const int64_t middle = (low + high) / 2;
        if (position(middle) < first) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    for (; low < end; ++low) {
        const int64_t column = position(low) - first;
        if (column < 0 || column >= probe.width) return;
        out[column] = load_float(store.data, store.dtype, low);
    }
}

// Rows of a sparse store as float32; -1 is none.
EMBCOMPRESS_INLINE void expand_rows(const Lookup& lookup, const Probe& probe, const int64_t* rows,
                                    int n, float* out) {
    const StoreView& store = lookup.stores[probe.store];
    const StoreView& index = lookup.stores[probe.sparsity.index_store];
    const bool masked = is_masked(lookup, probe);
    const bool has_mask = masked || probe.sparsity.form == SparsityForm::kMask;
    for (int i = 0; i < n; ++i) {
        if (rows[i] < 0 || !has_mask) continue;
        const int64_t bit = rows[i] * probe.width;
        __builtin_prefetch(static_cast<const char*>(index.data) + (bit >> 3));
        if (masked && store.dtype == Dtype::kFloat32) {
            __builtin_prefetch(static_cast<const float*>(store.data) + bit);
        }
    }
    for (int i = 0; i < n; ++i) {
        if (rows[i] < 0) continue;
        float* row = out + i * probe.width;
        std::fill(row, row + probe.width, 0.0f);
        if (masked) {
            for_each_kept(index, rows[i], probe.width, [&](int64_t column) {
                row[column] = load_float(store.data, store.dtype, rows[i] * probe.width + column);
                return true;
            });
        } else if (has_mask) {
            expand_by_mask(lookup, probe, rows[i], row);
        } else {
            expand_by_positions(lookup, probe, rows[i], row);
        }
    }
}

// Sets to zero what a mask does not keep of the gradient of a row.
EMBCOMPRESS_INLINE void clear_pruned(const Lookup& lookup, const Probe& probe, int64_t row,
                                     float* values) {
    const StoreView& mask = lookup.stores[probe.sparsity.index_store];
    for (int64_t c = 0; c < probe.width; c += 64) {
        const uint64_t bits = load_bits(mask, row * probe.width + c);
        const int64_t end = std::min<int64_t>(64, probe.width - c);
        for (int64_t k = 0; k < end; ++k) {
            if ((bits >> k & 1) == 0) values[c + k] = 0.0f;
        }
    }
}

}  // namespace embcompress
