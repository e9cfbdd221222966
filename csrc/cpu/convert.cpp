// Conversion of rows: one function for all who read rows, as it is long for every kind of row that
// there is.

#include "convert.h"

// Of a lambda: one that is not inlined is compiled for the oldest machine alone.

namespace embcompress {
namespace {

typedef uint32_t Codes __attribute__((vector_size(kUnpacked * sizeof(uint32_t))));
typedef int32_t SignedCodes __attribute__((vector_size(kUnpacked * sizeof(int32_t))));

// Eight codes of kBits < 16 bits from a bit of a byte on; fewer at the store's end, and zeros.
template <int kBits>
EMBCOMPRESS_INLINE Codes load_codes(const StoreView& store, int64_t byte, int shift) {
    const uint8_t* stream = static_cast<const uint8_t*>(store.data) + byte;
    uint64_t window = 0;
    if (byte + 8 <= store.bytes) {
        std::memcpy(&window, stream, 8);
    } else {
        for (int64_t k = 0; byte + k < store.bytes; ++k) {
            window |= static_cast<uint64_t>(stream[k]) << (8 * k);
        }
    }
    window >>= shift;
    const uint32_t low = static_cast<uint32_t>(window);
    const uint32_t high = static_cast<uint32_t>(window >> (4 * kBits));
    const Codes shifts = {0, kBits, 2 * kBits, 3 * kBits, 0, kBits, 2 * kBits, 3 * kBits};
    return (Codes{low, low, low, low, high, high, high, high} >> shifts) & ((1u << kBits) - 1);
}

// Eight codes of 16 bits from a byte on; fewer at the store's end, and zeros.
template <>
EMBCOMPRESS_INLINE Codes load_codes<16>(const StoreView& store, int64_t byte, int) {
    const uint8_t* stream = static_cast<const uint8_t*>(store.data) + byte;
    uint16_t words[kUnpacked] = {};
    if (byte + static_cast<int64_t>(sizeof(words)) <= store.bytes) {
        std::memcpy(words, stream, sizeof(words));
    } else {
        std::memcpy(words, stream, static_cast<size_t>(store.bytes - byte));
    }
    Codes codes;
    for (int64_t c = 0; c < kUnpacked; ++c) codes[c] = words[c];
    return codes;
}

// One row of kBits-bit codes. Eight codes are kBits bytes, so they begin at the same bit of a byte
// as the row does, and with that bit those of 8 bits and fewer lie within eight bytes.
template <int kBits, bool kBias>
EMBCOMPRESS_INLINE void unpack_row(const StoreView& store, int64_t row, int64_t width,
                                   const float* steps, float* out) {
    constexpr float kMiddle = static_cast<float>((1 << kBits) - 1) / 2;
    const int64_t first_bit = row * width * kBits;
    const int shift = static_cast<int>(first_bit & 7);
    for (int64_t c = 0; c < width; c += kUnpacked) {
        const Codes codes =
            load_codes<kBits>(store, (first_bit >> 3) + c / kUnpacked * kBits, shift);
        Values values = __builtin_convertvector((SignedCodes)codes, Values), step;
        std::memcpy(&step, steps + c, sizeof(step));
        if constexpr (kBias) {
            Values bias;
            std::memcpy(&bias, steps + steps_room(width) + c, sizeof(bias));
            values = step * values + bias;
        } else {
            values = step * (values - kMiddle);
        }
        std::memcpy(out + c, &values, sizeof(values));
    }
}

// Calls convert(i, row) for the rows of a range, whose numbers have `bits` bits; fetches rows
// ahead, also behind the end of the range.
template <typename Convert>
EMBCOMPRESS_INLINE void convert_each(const StoreView& store, const Probe& probe, int64_t bits,
                                     const RowRange& range, const Convert& convert) {
    const char* data = static_cast<const char*>(store.data);
    const int64_t* rows = range.rows;
    const int64_t row_bits = probe.stride * bits;
    const int64_t bytes = std::min<int64_t>((probe.width * bits + 7) / 8, 256);
    const auto fetch = [&](int i) EMBCOMPRESS_INLINED {
        if (i >= range.n || rows[i] < 0) return;
        const char* row = data + ((rows[i] * row_bits) >> 3);
        for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte);
    };
    for (int i = 0; range.begin == 0 && i < kRowsAhead; ++i) fetch(i);
    for (int i = range.begin; i < range.end; ++i) {
        fetch(i + kRowsAhead);
        if (rows[i] >= 0) convert(i, rows[i]);
    }
}

template <int kBits, bool kBias>
EMBCOMPRESS_INLINE void unpack_rows(const Lookup& lookup, const Probe& probe, const RowRange& range,
                                    float* steps) {
    const StoreView& store = lookup.stores[probe.store];
    const int64_t width = probe.width;
    const bool per_row = probe.quantization.per_row;
    convert_each(store, probe, kBits, range, [&](int i, int64_t row) EMBCOMPRESS_INLINED {
        if (per_row) load_steps(lookup, probe, row, steps);
        unpack_row<kBits, kBias>(store, row, width, steps, range.out + i * width);
    });
}

template <bool kBias>
EMBCOMPRESS_INLINE void unpack_rows(const Lookup& lookup, const Probe& probe, const RowRange& range,
                                    float* steps) {
    switch (probe.quantization.bits) {
        case 1:
            return unpack_rows<1, kBias>(lookup, probe, range, steps);
        case 2:
            return unpack_rows<2, kBias>(lookup, probe, range, steps);
        case 4:
            return unpack_rows<4, kBias>(lookup, probe, range, steps);
        case 8:
            return unpack_rows<8, kBias>(lookup, probe, range, steps);
        default:
            return unpack_rows<16, kBias>(lookup, probe, range, steps);
    }
}

// Rows of float16 and bfloat16.
EMBCOMPRESS_INLINE void widen_rows(const Lookup& lookup, const Probe& probe,
                                   const RowRange& range) {
    const StoreView& store = lookup.stores[probe.store];
    const int64_t width = probe.width;
    convert_each(store, probe, 16, range, [&](int i, int64_t row) EMBCOMPRESS_INLINED {
        float* to = range.out + i * width;
        for (int64_t c = 0; c < width; ++c) {
            to[c] = load_float(store.data, store.dtype, row * probe.stride + c);
        }
    });
}

// Values of latents of any floats.
EMBCOMPRESS_INLINE void read_rows(const Lookup& lookup, const Probe& probe, const RowRange& range,
                                  float* steps) {
    const StoreView& store = lookup.stores[probe.store];
    const int64_t width = probe.width, bits = store.dtype == Dtype::kFloat32 ? 32 : 16;
    const bool per_row = probe.quantization.per_row;
    convert_each(store, probe, bits, range, [&](int i, int64_t row) EMBCOMPRESS_INLINED {
        if (per_row) load_steps(lookup, probe, row, steps);
        for (int64_t c = 0; c < width; c += kUnpacked) {
            store_lanes(range.out + i * width + c, latents_at(lookup, probe, row, c, steps).value);
        }
    });
}

}  // namespace

EMBCOMPRESS_CLONES void convert_rows(const Lookup& lookup, const Probe& probe,
                                     const RowRange& range, float* steps) {
    if (is_sparse(probe)) {
        return expand_rows(lookup, probe, range.rows + range.begin, range.end - range.begin,
                           range.out + range.begin * probe.width);
    }
    const Quantization& q = probe.quantization;
    if (q.bits > 0 && !q.per_row && range.begin == 0) load_steps(lookup, probe, 0, steps);
    if (q.bits == 0) {
        widen_rows(lookup, probe, range);
    } else if (lookup.stores[probe.store].dtype != Dtype::kPacked) {
        read_rows(lookup, probe, range, steps);
    } else if (q.bias_store < 0) {
        unpack_rows<false>(lookup, probe, range, steps);
    } else {
        unpack_rows<true>(lookup, probe, range, steps);
    }
}

}  // namespace embcompress
