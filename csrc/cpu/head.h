// Heads: a linear map of a feature's pooled vectors, out = head * vector.

#pragma once

#include <vector>

#include "pooling.h"

namespace embcompress {

// out[r] (+)= sum over c of in[r, c] * columns[c], c < depth, in order; in[r, c] is at
// in[r * row + c * column], or at pointers[r][c * column] where rows lie apart (kApart), columns[c]
// at columns + c * stride, out[r] at out + r * out_stride.
struct Product {
    const float* in;
    int64_t row;
    int64_t column;
    const float* columns;
    int64_t stride;
    float* out;
    int64_t out_stride;
    int64_t rows;
    int64_t depth;
    int64_t width;  // of out
    bool add;
    const float* const* pointers = nullptr;
    bool streamed = false;  // out is written past the caches
};

template <int kLanes, int kRows, bool kApart>
EMBCOMPRESS_INLINE void multiply_lanes(const Product& product, int64_t first, int64_t at) {
    typedef typename Lanes<kLanes>::Type V;
    const float* in = kApart ? nullptr : product.in + first * product.row;
    const float* const* pointers = kApart ? product.pointers + first : nullptr;
    float* out = product.out + first * product.out_stride + at;
    V sums[kRows];
    for (int r = 0; r < kRows; ++r) {
        sums[r] = product.add ? load_lanes<V>(out + r * product.out_stride) : V{};
    }
    for (int64_t c = 0; c < product.depth; ++c) {
        const V column = load_lanes<V>(product.columns + c * product.stride + at);
        for (int r = 0; r < kRows; ++r) {
            const float* row = kApart ? pointers[r] : in + r * product.row;
            sums[r] += column * row[c * product.column];
        }
    }
    for (int r = 0; r < kRows; ++r) {
        write_lanes(out + r * product.out_stride, sums[r], product.streamed);
    }
}

template <int kLanes, int kRows, bool kApart>
EMBCOMPRESS_INLINE void multiply_rows(const Product& product, int64_t first) {
    int64_t at = 0;
    for (; at + kLanes <= product.width; at += kLanes) {
        multiply_lanes<kLanes, kRows, kApart>(product, first, at);
    }
    for (; at + 4 <= product.width; at += 4) multiply_lanes<4, kRows, kApart>(product, first, at);
    for (; at < product.width; ++at) multiply_lanes<1, kRows, kApart>(product, first, at);
}

template <int kLanes, bool kApart = false>
EMBCOMPRESS_INLINE void multiply(const Product& product) {
    int64_t row = 0;
    for (; row + 4 <= product.rows; row += 4) multiply_rows<kLanes, 4, kApart>(product, row);
    for (; row < product.rows; ++row) multiply_rows<kLanes, 1, kApart>(product, row);
}

// The head of a feature in float32, by rows (for gradients) or by columns (for values).
inline std::vector<float> load_head(const Lookup& lookup, const Feature& feature, bool by_columns) {
    if (feature.head_store < 0) return {};
    const StoreView& store = lookup.stores[feature.head_store];
    const int64_t rows = feature.out_width, width = feature.width;
    std::vector<float> head(rows * width);
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < width; ++c) {
            head[by_columns ? c * rows + r : r * width + c] =
                load_float(store.data, store.dtype, r * width + c);
        }
    }
    return head;
}

}  // namespace embcompress
