// From an id to numbers: addresses, codes, rows of any store, several columns a lane at once.

#pragma once

#include "inputs.h"
#include "launch.cuh"

namespace embcompress {
namespace cuda {

// The records of a plan, wherever they are.
struct PlanView {
    const int64_t* words;
    const PlanLayout* layout;

    __device__ explicit PlanView(const PlanArgument& plan)
        : words(plan.memory == nullptr ? plan.words : plan.memory), layout(&plan.layout) {}

    EMBCOMPRESS_DEVICE const BoundFeature& feature(int64_t number) const {
        return reinterpret_cast<const BoundFeature*>(words + layout->features)[number];
    }
    EMBCOMPRESS_DEVICE const BoundProbe* probes(const BoundFeature& feature) const {
        return reinterpret_cast<const BoundProbe*>(words + feature.records);
    }
    EMBCOMPRESS_DEVICE const Use& use(int64_t number) const {
        return reinterpret_cast<const Use*>(words + layout->uses)[number];
    }
    EMBCOMPRESS_DEVICE const Target& target(int64_t number) const {
        return reinterpret_cast<const Target*>(words + layout->targets)[number];
    }
    EMBCOMPRESS_DEVICE int64_t ordered(int64_t number) const {
        return (words + layout->order)[number];
    }
};

// ---------------------------------------------------------------------------------- addresses

EMBCOMPRESS_DEVICE int64_t row_of(const Address& address, int64_t id) {
    // 64-bit division is a long routine on a GPU, 32-bit division a short one.
    if (address.kind == AddressKind::kDigit &&
        (static_cast<uint64_t>(id | address.a | address.b) >> 32) == 0) {
        const uint32_t quotient = static_cast<uint32_t>(id) / static_cast<uint32_t>(address.a);
        return quotient % static_cast<uint32_t>(address.b);
    }
    return address_row(address, id);
}

// Where what a table of codes gave leads to in the end; negative: nowhere. Kernels of plain probes,
// which are short of registers, leave out the second table.
template <bool kTwoTables = true>
EMBCOMPRESS_DEVICE int64_t or_otherwise(const BoundCode& code, int64_t id, int64_t found) {
    if (found != kOtherwise) return found;
    if (!code.has_otherwise) return kNowhere;
    const int64_t row = row_of(code.otherwise, id);
    const BoundTable* other = kTwoTables ? code.other() : nullptr;
    return other == nullptr ? row : find_row(other->codes, other->data, other->bytes, row, id);
}

// The row that a row of the table of codes, or a bucket of slots, leads to; negative: none.
template <bool kTwoTables = true>
EMBCOMPRESS_DEVICE int64_t decode(const BoundCode& code, int64_t id, int64_t code_row) {
    const BoundTable& table = code.table;
    const int64_t found = find_row(table.codes, table.data, table.bytes, code_row, id);
    return or_otherwise<kTwoTables>(code, id, found);
}

// Row of a checked id in the store of a probe; -1: absent.
template <bool kTwoTables = true>
EMBCOMPRESS_DEVICE int64_t probe_row(const BoundProbe& bound, int64_t id) {
    int64_t row = row_of(bound.address, id);
    if (const BoundCode* code = bound.code()) row = decode<kTwoTables>(*code, id, row);
    return row < 0 ? -1 : row + bound.offset;
}

// Row of the learned scale of a checked id; negative: absent.
EMBCOMPRESS_DEVICE int64_t scale_row(const BoundScale& scale, int64_t id) {
    const int64_t row = row_of(scale.address, id);
    const BoundCode* code = scale.code();
    return code == nullptr ? row : decode(*code, id, row);
}

EMBCOMPRESS_DEVICE float probe_scale(const BoundProbe& bound, int64_t id) {
    const BoundScale* scale = bound.scale();
    if (scale == nullptr) return 1.0f;
    if (scale->kind == ScaleKind::kSign) return hash_sign(id, static_cast<uint64_t>(scale->key));
    const int64_t row = scale_row(*scale, id);
    if (row < 0) return 0.0f;
    const StoreView& store = scale->store;
    return load_float(store.data, store.dtype, row * store.width + scale->column);
}

// An id if it is in the vocabulary and no padding; -1 otherwise.
EMBCOMPRESS_DEVICE int64_t checked_id(const BoundFeature& feature, int64_t id, bool* inside) {
    *inside = static_cast<uint64_t>(id) < static_cast<uint64_t>(feature.num_embeddings);
    return *inside && id != feature.padding_idx ? id : -1;
}

// ------------------------------------------------------------------------------------ numbers

EMBCOMPRESS_DEVICE bool is_packed(const BoundProbe& bound) {
    return bound.store.dtype == Dtype::kPacked;
}

EMBCOMPRESS_DEVICE bool is_latent(const BoundProbe& bound) {
    return bound.bits > 0 && !is_packed(bound);
}

// Where the step and bias of a column are.
EMBCOMPRESS_DEVICE int64_t step_position(const BoundProbe& bound, int64_t row, int64_t column) {
    const BoundSteps& steps = *bound.steps();
    return (steps.per_row ? row * steps.step.width : 0) + (steps.per_column ? column : 0);
}

EMBCOMPRESS_DEVICE Latent<float> latent_of(const BoundProbe& bound, int64_t row, int64_t column,
                                           float value) {
    const BoundSteps& steps = *bound.steps();
    const int64_t at = step_position(bound, row, column);
    const float step = load_float(steps.step.data, steps.step.dtype, at);
    if (!steps.has_bias) return read_latent<float>(value, step, nullptr, bound.bits);
    const float bias = load_float(steps.bias.data, steps.bias.dtype, at);
    return read_latent<float>(value, step, &bias, bound.bits);
}

// The value of a code: the same operations in the same order as for latents, so the same bits.
EMBCOMPRESS_DEVICE float dequantize(const BoundProbe& bound, int64_t row, int64_t column,
                                    float code) {
    const BoundSteps& steps = *bound.steps();
    const int64_t at = step_position(bound, row, column);
    const float step = load_float(steps.step.data, steps.step.dtype, at);
    if (!steps.has_bias) return step * (code - static_cast<float>((1 << bound.bits) - 1) / 2);
    return step * code + load_float(steps.bias.data, steps.bias.dtype, at);
}

// What is stored in column c of a row: a float, or a code.
EMBCOMPRESS_DEVICE float stored_number(const BoundProbe& bound, int64_t row, int64_t column) {
    const int64_t position = row * bound.width + column;
    if (!is_packed(bound)) return load_float(bound.store.data, bound.store.dtype, position);
    return static_cast<float>(unpack_bits(static_cast<const uint8_t*>(bound.store.data),
                                          bound.store.bytes, position, bound.bits));
}

// The number that a stored one stands for.
EMBCOMPRESS_DEVICE float value_of(const BoundProbe& bound, int64_t row, int64_t column,
                                  float stored) {
    if (bound.bits == 0) return stored;
    if (is_packed(bound)) return dequantize(bound, row, column, stored);
    return latent_of(bound, row, column, stored).value;
}

// ------------------------------------------------------------------------------ many at once

// What lies at an address, in one access of sizeof(T) bytes.
template <typename T>
EMBCOMPRESS_DEVICE T& at(const void* pointer) {
    EMBCOMPRESS_CHECK_ALIGNED(pointer, sizeof(T));
    return *static_cast<T*>(const_cast<void*>(pointer));
}

EMBCOMPRESS_DEVICE void load_16(const void* from, uint32_t* words) {
    const uint4 quad = at<uint4>(from);
    words[0] = quad.x;
    words[1] = quad.y;
    words[2] = quad.z;
    words[3] = quad.w;
}

EMBCOMPRESS_DEVICE void load_8(const void* from, uint32_t* words) {
    const uint2 pair = at<uint2>(from);
    words[0] = pair.x;
    words[1] = pair.y;
}

template <int C>
EMBCOMPRESS_DEVICE void load_floats(const float* from, float (&to)[C]) {
#pragma unroll
    for (int c = 0; c < C; c += 4) {
        const float4 quad = at<float4>(from + c);
        to[c] = quad.x;
        to[c + 1] = quad.y;
        to[c + 2] = quad.z;
        to[c + 3] = quad.w;
    }
}

// Numbers that nothing writes while the kernel runs: the load may pass stores.
EMBCOMPRESS_DEVICE void read_floats(const float* from, float (&to)[2]) {
    EMBCOMPRESS_CHECK_ALIGNED(from, sizeof(float2));
    const float2 pair = __ldg(reinterpret_cast<const float2*>(from));
    to[0] = pair.x;
    to[1] = pair.y;
}

EMBCOMPRESS_DEVICE void read_floats(const float* from, float (&to)[4]) {
    EMBCOMPRESS_CHECK_ALIGNED(from, sizeof(float4));
    const float4 quad = __ldg(reinterpret_cast<const float4*>(from));
    to[0] = quad.x;
    to[1] = quad.y;
    to[2] = quad.z;
    to[3] = quad.w;
}

template <int C>
EMBCOMPRESS_DEVICE void store_floats(float* to, const float (&from)[C]) {
    if constexpr (C == 2) {
        at<float2>(to) = make_float2(from[0], from[1]);
    } else {
#pragma unroll
        for (int c = 0; c < C; c += 4) {
            at<float4>(to + c) = make_float4(from[c], from[c + 1], from[c + 2], from[c + 3]);
        }
    }
}

// Columns [column, column + C) of a piece of memory of `width` floats; zeros outside of it.
template <int C>
EMBCOMPRESS_DEVICE void load_some(const float* from, int64_t column, int64_t width, bool aligned,
                                  float (&to)[C]) {
    if (aligned && column + C <= width) return load_floats(from + column, to);
#pragma unroll
    for (int c = 0; c < C; ++c) to[c] = column + c < width ? from[column + c] : 0.0f;
}

template <int C>
EMBCOMPRESS_DEVICE void store_some(float* to, int64_t column, int64_t width, bool aligned,
                                   const float (&from)[C]) {
    if (aligned && column + C <= width) return store_floats(to + column, from);
#pragma unroll
    for (int c = 0; c < C; ++c) {
        if (column + c < width) to[column + c] = from[c];
    }
}

EMBCOMPRESS_DEVICE bool is_aligned(const void* pointer, int64_t width) {
    return (reinterpret_cast<uintptr_t>(pointer) % 16 | width % 4) == 0;
}

// Whether C numbers of a row are loaded as half-words: 16-bit floats and codes of 16 bits.
EMBCOMPRESS_DEVICE bool has_half_words(const BoundProbe& bound) {
    return is_packed(bound) ? bound.bits == 16 : bound.store.dtype != Dtype::kFloat32;
}

// C numbers of fewer than 16 bits of a packed row, as many bytes as they are: `position` is a
// multiple of C.
template <int C>
EMBCOMPRESS_DEVICE uint64_t load_codes(const StoreView& store, int64_t position, int64_t bits) {
    const uint8_t* from = static_cast<const uint8_t*>(store.data) + (position * bits >> 3);
    switch (C * bits) {
        case 64: {
            uint32_t words[2];
            load_8(from, words);
            return static_cast<uint64_t>(words[1]) << 32 | words[0];
        }
        case 32:
            return at<uint32_t>(from);
        case 16:
            return at<uint16_t>(from);
        case 8:
            return *from;
        default:  // four single bits
            return *from >> (position & 7);
    }
}

// Raw numbers of U rows, C columns from `column` on: loads alone, none of which waits for another.
// `rows` are of consecutive ids; -1 gives zeros.
template <int C, int U>
EMBCOMPRESS_DEVICE void fetch_vectors(const BoundProbe& bound, const int64_t* rows, int64_t column,
                                      uint32_t (&raw)[U][C]) {
    const StoreView& store = bound.store;
    const int64_t width = bound.width;
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int c = 0; c < C; ++c) raw[u][c] = 0;
    }
    if (C < 8 && store.dtype == Dtype::kFloat32) {  // lanes of 8 columns are for narrower numbers
        const float* data = static_cast<const float*>(store.data) + column;
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (rows[u] < 0) continue;
#pragma unroll
            for (int c = 0; c < C; c += 4) load_16(data + rows[u] * width + c, raw[u] + c);
        }
    } else if (!has_half_words(bound)) {
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (rows[u] < 0) continue;
            const uint64_t codes = load_codes<C>(store, rows[u] * width + column, bound.bits);
            raw[u][0] = static_cast<uint32_t>(codes);
            raw[u][1] = static_cast<uint32_t>(codes >> 32);
        }
    } else {
        const uint16_t* data = static_cast<const uint16_t*>(store.data) + column;
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (rows[u] < 0) continue;
            const uint16_t* row = data + rows[u] * width;
            if (C == 8) {
                load_16(row, raw[u]);
            } else {
                load_8(row, raw[u]);
            }
        }
    }
}

EMBCOMPRESS_DEVICE float as_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
#endif
}

// The stored numbers in what fetch_vectors loaded.
template <int C>
EMBCOMPRESS_DEVICE void unpack_vector(const BoundProbe& bound, const uint32_t (&raw)[C],
                                      float (&stored)[C]) {
    if (C < 8 && bound.store.dtype == Dtype::kFloat32) {
#pragma unroll
        for (int c = 0; c < C; ++c) stored[c] = as_float(raw[c]);
    } else if (!has_half_words(bound)) {
        const int bits = static_cast<int>(bound.bits);
        const uint32_t mask = (1u << bits) - 1;
        const uint64_t codes = static_cast<uint64_t>(raw[1]) << 32 | raw[0];
#pragma unroll
        for (int c = 0; c < C; ++c) {
            stored[c] = static_cast<float>(static_cast<uint32_t>(codes >> (c * bits)) & mask);
        }
    } else {
        const Dtype dtype = bound.store.dtype;
#pragma unroll
        for (int c = 0; c < C; ++c) {
            const uint16_t number = static_cast<uint16_t>(raw[c / 2] >> (c % 2 * 16));
            stored[c] = dtype == Dtype::kPacked    ? static_cast<float>(number)
                        : dtype == Dtype::kFloat16 ? half_to_float(number)
                                                   : bfloat_to_float(number);
        }
    }
}

// Values of U rows, C columns from `column` on (which may lie outside of the row: zeros there).
template <int C, int U>
EMBCOMPRESS_DEVICE void load_values(const BoundProbe& bound, const int64_t* rows, int64_t column,
                                    float (&values)[U][C]) {
    const int64_t width = bound.width;
    const bool at_once = bound.vector_columns >= C && column >= 0 && column + C <= width;
    uint32_t raw[U][C];
    if (at_once) fetch_vectors<C, U>(bound, rows, column, raw);
#pragma unroll
    for (int u = 0; u < U; ++u) {
        const int64_t row = rows[u];
        if (at_once) {
            unpack_vector(bound, raw[u], values[u]);
        } else {
#pragma unroll
            for (int c = 0; c < C; ++c) {
                const bool inside = row >= 0 && column + c >= 0 && column + c < width;
                values[u][c] = inside ? stored_number(bound, row, column + c) : 0.0f;
            }
        }
        if (bound.bits == 0) continue;
#pragma unroll
        for (int c = 0; c < C; ++c) {
            const bool inside = row >= 0 && column + c >= 0 && column + c < width;
            if (inside) values[u][c] = value_of(bound, row, column + c, values[u][c]);
        }
    }
}

// -------------------------------------------------------------------------------------- groups

// The lanes of a warp that work together, a power of two of them.
struct Group {
    int lanes;
    int lane;
    int number;     // in the block
    int first;      // of its lanes, in the warp
    unsigned mask;  // of its lanes in the warp

    __device__ explicit Group(int lanes_) : lanes(lanes_) {
        const int thread = static_cast<int>(threadIdx.x);
        lane = thread & (lanes - 1);
        number = thread / lanes;
        first = (thread & 31) - lane;
        mask = lanes == 32 ? 0xFFFFFFFFu : ((1u << lanes) - 1) << first;
    }

    EMBCOMPRESS_DEVICE void sync() const { __syncwarp(mask); }

    // What one lane of the group hands in, for all.
    template <typename T>
    EMBCOMPRESS_DEVICE T read(T value, int from) const {
        return __shfl_sync(mask, value, from, lanes);
    }

    // A bit for every lane of the group.
    EMBCOMPRESS_DEVICE unsigned ballot(bool bit) const {
        return (__ballot_sync(mask, bit) & mask) >> first;
    }

    // The sum over the lanes, in an order that is always the same; every lane gets it.
    EMBCOMPRESS_DEVICE float sum(float value) const {
        for (int distance = lanes / 2; distance > 0; distance /= 2) {
            value += __shfl_xor_sync(mask, value, distance);
        }
        return value;
    }
};

}  // namespace cuda
}  // namespace embcompress
