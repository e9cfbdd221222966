// Sums over ids of products of rows, a vector of columns at a time. Forward pools the rows of bags;
// backward pools the gradients of the ids that read one row.

#pragma once

#include "rows.h"

namespace embcompress {

// The sum of the numbers of a vector, halves by halves.
template <int kLanes>
EMBCOMPRESS_INLINE float sum_lanes(typename Lanes<kLanes>::Type lanes) {
    if constexpr (kLanes == 1) {
        return lanes;
    } else {
        typename Lanes<kLanes / 2>::Type halves[2];
        std::memcpy(halves, &lanes, sizeof(lanes));
        return sum_lanes<kLanes / 2>(halves[0] + halves[1]);
    }
}

// Sum of n products, in an order that no instruction set changes.
template <typename F>
EMBCOMPRESS_INLINE float sum_of(int64_t n, const F& term) {
    constexpr int kWidth = 16;
    float sums[kWidth] = {};
    int64_t c = 0;
    for (; c + kWidth <= n; c += kWidth) {
        for (int k = 0; k < kWidth; ++k) sums[k] += term(c + k);
    }
    for (int k = 0; c + k < n; ++k) sums[k] += term(c + k);
    return sum_lanes<kWidth>(load_lanes<Lanes<kWidth>::Type>(sums));
}

// The rows of some probes, for every id of a block.
struct ProbeRows {
    const float* const* pointers;  // of the first probe; the next one's are kBlock further
    const float* scales;           // likewise; nullptr: none of them is scaled
    int count;
};

// kVectors vectors of columns, from `column` on, of id number i, its probes combined. kProbes is
// their number, unscaled, or 0 where neither is known. Each pointer is read once: what is written
// between might be pointers, for all that the compiler knows.
template <typename V, int kVectors, bool kMul, int kProbes>
EMBCOMPRESS_INLINE void combine_lanes(const ProbeRows& rows, int i, int64_t column,
                                      V (&values)[kVectors]) {
    constexpr int kLanes = sizeof(V) / sizeof(float);
    const int count = kProbes == 0 ? rows.count : kProbes;
    const bool scaled = kProbes == 0 && rows.scales != nullptr;
    const float* row = rows.pointers[i] + column;
    for (int v = 0; v < kVectors; ++v) {
        values[v] = load_lanes<V>(row + v * kLanes);
        if (scaled) values[v] *= rows.scales[i];
    }
    for (int t = 1; t < count; ++t) {
        row = rows.pointers[t * kBlock + i] + column;
        for (int v = 0; v < kVectors; ++v) {
            V next = load_lanes<V>(row + v * kLanes);
            if (scaled) next *= rows.scales[t * kBlock + i];
            values[v] = kMul ? values[v] * next : values[v] + next;
        }
    }
}

// What becomes of a block's vectors: ids [begin, end) are added to `out` (to zero where `start`),
// or id number i is written to out + i * stride, or added to sums[i]. Weights are of the ids, or
// nullptr.
struct Target {
    int begin;
    int end;
    const float* weights;
    bool start;
    int64_t stride;  // 0: the ids are added up
    float* out;
    bool streamed = false;
    float* const* sums = nullptr;  // nullptr: all go to `out`
};

// kVectors vectors of kLanes columns, from `column` on. Sums run over ids in order, so the width
// of the vectors changes no bit.
template <int kLanes, int kVectors, bool kMul, int kProbes>
EMBCOMPRESS_INLINE void pool_lanes(const ProbeRows& rows, const Target& target, int64_t column) {
    typedef typename Lanes<kLanes>::Type V;
    if (target.sums != nullptr) {
        for (int i = target.begin; i < target.end; ++i) {
            V values[kVectors];
            combine_lanes<V, kVectors, kMul, kProbes>(rows, i, column, values);
            float* to = target.sums[i] + column;
            for (int v = 0; v < kVectors; ++v) {
                if (target.weights != nullptr) values[v] *= target.weights[i];
                store_lanes(to + v * kLanes, load_lanes<V>(to + v * kLanes) + values[v]);
            }
        }
        return;
    }
    float* out = target.out + column;
    if (target.stride != 0) {
        for (int i = target.begin; i < target.end; ++i) {
            V values[kVectors];
            combine_lanes<V, kVectors, kMul, kProbes>(rows, i, column, values);
            float* to = out + i * target.stride;
            for (int v = 0; v < kVectors; ++v) {
                if (target.weights != nullptr) values[v] *= target.weights[i];
                write_lanes(to + v * kLanes, values[v], target.streamed);
            }
        }
        return;
    }
    V sums[kVectors];
    for (int v = 0; v < kVectors; ++v) {
        sums[v] = target.start ? V{} : load_lanes<V>(out + v * kLanes);
    }
    for (int i = target.begin; i < target.end; ++i) {
        V values[kVectors];
        combine_lanes<V, kVectors, kMul, kProbes>(rows, i, column, values);
        for (int v = 0; v < kVectors; ++v) {
            if (target.weights != nullptr) values[v] *= target.weights[i];
            sums[v] += values[v];
        }
    }
    for (int v = 0; v < kVectors; ++v) store_lanes(out + v * kLanes, sums[v]);
}

// Blocks of kColumns from `column` on, in vectors of at most kLanes. Returns where they end.
template <int kColumns, int kLanes, bool kMul, int kProbes>
EMBCOMPRESS_INLINE int64_t pool_blocks(const ProbeRows& rows, const Target& target, int64_t column,
                                       int64_t width) {
    constexpr int kWidth = std::min(kColumns, kLanes);
    for (; column + kColumns <= width; column += kColumns) {
        pool_lanes<kWidth, kColumns / kWidth, kMul, kProbes>(rows, target, column);
    }
    return column;
}

template <int kLanes, bool kMul, int kProbes>
EMBCOMPRESS_INLINE void pool_columns(const ProbeRows& rows, const Target& target, int64_t width) {
    // As many columns at once as the registers hold sums and values of.
    constexpr int kMost = std::min(64, 8 * kLanes);
    int64_t c = pool_blocks<kMost, kLanes, kMul, kProbes>(rows, target, 0, width);
    c = pool_blocks<16, kLanes, kMul, kProbes>(rows, target, c, width);
    c = pool_blocks<4, kLanes, kMul, kProbes>(rows, target, c, width);
    pool_blocks<1, kLanes, kMul, kProbes>(rows, target, c, width);
}

template <int kLanes, bool kMul>
EMBCOMPRESS_INLINE void pool_probes(const ProbeRows& rows, const Target& target, int64_t width) {
    if (rows.scales != nullptr) {
        pool_columns<kLanes, kMul, 0>(rows, target, width);
    } else if (rows.count == 1) {
        pool_columns<kLanes, false, 1>(rows, target, width);
    } else if (rows.count == 2) {
        pool_columns<kLanes, kMul, 2>(rows, target, width);
    } else if (rows.count == 4) {
        pool_columns<kLanes, kMul, 4>(rows, target, width);
    } else {
        pool_columns<kLanes, kMul, 0>(rows, target, width);
    }
}

}  // namespace embcompress
