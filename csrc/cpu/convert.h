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

// Column c of a row of latents.
EMBCOMPRESS_INLINE Latent latent_at(const Lookup& lookup, const Probe& probe, int64_t row,
                                    int64_t c) {
    const StoreView& store = lookup.stores[probe.store];
    const Quantization& q = probe.quantization;
    const StoreView& scale = lookup.stores[q.scale_store];
    const int64_t at = (q.per_row ? row * scale.width : 0) + (q.per_column ? c : 0);
    const float value = load_float(store.data, store.dtype, row * probe.width + c);
    const float step = load_float(scale.data, scale.dtype, at);
    if (q.bias_store < 0) return read_latent(value, step, nullptr, q.bits);
    const StoreView& bias = lookup.stores[q.bias_store];
    const float shift = load_float(bias.data, bias.dtype, at);
    return read_latent(value, step, &shift, q.bits);
}

// Code of column c of a packed row.
EMBCOMPRESS_INLINE float packed_code_at(const Lookup& lookup, const Probe& probe, int64_t row,
                                        int64_t c) {
    const StoreView& store = lookup.stores[probe.store];
    return static_cast<float>(unpack_bits(static_cast<const uint8_t*>(store.data), store.bytes,
                                          row * probe.width + c, probe.quantization.bits));
}

// Rows are unpacked eight columns at a time: where rows and steps are written there is room for
// this many numbers more.
constexpr int64_t kUnpacked = 8;

// Room for the steps of a row, or for its biases.
inline int64_t steps_room(int64_t width) { return (width + kUnpacked - 1) / kUnpacked * kUnpacked; }

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
