// From stored rows to float32 on the CPU: decoded rows, scales, packed codes, latents.

#pragma once

#include <algorithm>
#include <cstring>

#include "../numbers.h"
#include "sparse.h"
#include "vectors.h"

namespace embcompress {

EMBCOMPRESS_INLINE int64_t table_row(const Lookup& lookup, const CodeTable& table, int64_t id,
                                     int64_t code_row) {
    const StoreView& store = lookup.stores[table.store];
    return find_row(table, store.data, store.bytes, code_row, id);
}

// The row that an absent id goes to; negative: none. Few ids come here, so it need not be inlined.
inline int64_t otherwise_row(const Lookup& lookup, const Code& code, int64_t id) {
    if (!code.has_otherwise) return kNowhere;
    const int64_t row = address_row(code.otherwise, id);
    return code.other.store < 0 ? row : table_row(lookup, code.other, id, row);
}

// The row that a row of the table of codes, or a bucket of slots, leads to; negative: none.
EMBCOMPRESS_INLINE int64_t decode_row(const Lookup& lookup, const Code& code, int64_t id,
                                      int64_t code_row) {
    const int64_t row = table_row(lookup, code.table, id, code_row);
    return row != kOtherwise ? row : otherwise_row(lookup, code, id);
}

// Row of a learned scale; negative where absent.
EMBCOMPRESS_INLINE int64_t scale_row(const Lookup& lookup, const Scale& scale, int64_t id) {
    const int64_t row = address_row(scale.address, id);
    return scale.code.table.store < 0 ? row : decode_row(lookup, scale.code, id, row);
}

EMBCOMPRESS_INLINE float scale_of(const Lookup& lookup, const Scale& scale, int64_t id) {
    if (scale.kind == ScaleKind::kNone) return 1.0f;
    if (scale.kind == ScaleKind::kSign) return hash_sign(id, static_cast<uint64_t>(scale.key));
    const StoreView& store = lookup.stores[scale.store];
    const int64_t row = scale_row(lookup, scale, id);
    if (row < 0) return 0.0f;
    return load_float(store.data, store.dtype, row * store.width + scale.column);
}

// Whether the packed rows of a probe are in training, held as float latents.
inline bool is_latent(const Lookup& lookup, const Probe& probe) {
    return probe.quantization.bits > 0 && lookup.stores[probe.store].dtype != Dtype::kPacked;
}

// Rows are unpacked, and latents read, eight columns at a time: where rows and steps are written
// there is room for this many numbers more.
constexpr int64_t kUnpacked = 8;
typedef Lanes<kUnpacked>::Type Values;

// Room for the steps of a row, or for its biases.
inline int64_t steps_room(int64_t width) { return (width + kUnpacked - 1) / kUnpacked * kUnpacked; }

// Steps and biases of one row, a number for every column; biases, behind the steps, only where the
// quantization has any.
EMBCOMPRESS_INLINE void load_steps(const Lookup& lookup, const Probe& probe, int64_t row,
                                   float* steps) {
    const Quantization& q = probe.quantization;
    const StoreView* parts[] = {&lookup.stores[q.scale_store],
                                q.bias_store < 0 ? nullptr : &lookup.stores[q.bias_store]};
    for (int part = 0; part < 2 && parts[part] != nullptr; ++part) {
        const StoreView& store = *parts[part];
        const int64_t base = q.per_row ? row * store.width : 0;
        float* out = steps + part * steps_room(probe.width);
        for (int64_t c = 0; c < probe.width; ++c) {
            out[c] = load_float(store.data, store.dtype, base + (q.per_column ? c : 0));
        }
    }
}

// Numbers of a float store from an index on; zeros behind `count` of them.
EMBCOMPRESS_INLINE Values load_numbers(const StoreView& store, int64_t index, int64_t count) {
    int64_t k = 0;
    Values numbers = {};
    if (store.dtype == Dtype::kFloat32) {
        const float* from = static_cast<const float*>(store.data) + index;
        if (count >= kUnpacked) return load_lanes<Values>(from);
        if (count >= kUnpacked / 2) {
            std::memcpy(&numbers, from, sizeof(Values) / 2);
            k = kUnpacked / 2;
        }
    }
    for (count = std::min(count, kUnpacked); k < count; ++k) {
        numbers[k] = load_float(store.data, store.dtype, index + k);
    }
    return numbers;
}

// Latents of a row from column c on, of which those behind the row mean nothing. `steps` are those
// of the row.
EMBCOMPRESS_INLINE Latent<Values> latents_at(const Lookup& lookup, const Probe& probe, int64_t row,
                                             int64_t c, const float* steps) {
    const StoreView& store = lookup.stores[probe.store];
    const Quantization& q = probe.quantization;
    const Values values = load_numbers(store, row * probe.stride + c, probe.width - c);
    const Values step = load_lanes<Values>(steps + c);
    if (q.bias_store < 0) return read_latent<Values>(values, step, nullptr, q.bits);
    const Values bias = load_lanes<Values>(steps + steps_room(probe.width) + c);
    return read_latent<Values>(values, step, &bias, q.bits);
}

// Code of column c of a packed row.
EMBCOMPRESS_INLINE float packed_code_at(const Lookup& lookup, const Probe& probe, int64_t row,
                                        int64_t c) {
    const StoreView& store = lookup.stores[probe.store];
    return static_cast<float>(unpack_bits(static_cast<const uint8_t*>(store.data), store.bytes,
                                          row * probe.width + c, probe.quantization.bits));
}

// How many rows ahead of their use those that are converted are fetched: a processor has about as
// many lines under way at once.
constexpr int kRowsAhead = 32;

// Rows [begin, end) of n to be converted; -1 is none. `out` is that of row 0.
struct RowRange {
    const int64_t* rows;
    int begin;
    int end;
    int n;
    float* out;
};

// Rows of a probe's store as float32; ranges of the same rows follow each other. `steps` has room
// for those and the biases of a row, `out` for kUnpacked numbers more.
void convert_rows(const Lookup& lookup, const Probe& probe, const RowRange& range, float* steps);

}  // namespace embcompress
