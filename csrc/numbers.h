// Numbers as stores hold them: 16-bit floats, and latents read as the codes that they will be.

#pragma once

#include <cfloat>
#include <cstdint>
#include <cstring>

#include "plan.h"

namespace embcompress {

enum class Dtype : int8_t { kFloat32, kFloat16, kBFloat16, kPacked };

EMBCOMPRESS_INLINE float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    const uint32_t magnitude = half & 0x7FFF;
    uint32_t bits;
    if (magnitude >= 0x7C00) {  // infinities and NaN
        bits = sign | 0x7F800000 | (magnitude & 0x3FF) << 13;
    } else if (magnitude >= 0x400) {
        bits = sign | ((magnitude << 13) + 0x38000000);
    } else {  // subnormal: exact in float32
        const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
        std::memcpy(&bits, &value, sizeof(bits));
        bits |= sign;
    }
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
}

EMBCOMPRESS_INLINE float bfloat_to_float(uint16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
}

EMBCOMPRESS_INLINE float load_float(const void* data, Dtype dtype, int64_t index) {
    if (dtype == Dtype::kFloat32) return static_cast<const float*>(data)[index];
    const uint16_t value = static_cast<const uint16_t*>(data)[index];
    return dtype == Dtype::kFloat16 ? half_to_float(value) : bfloat_to_float(value);
}

// A number of a row that is trained to be packed, or a vector of them: where it lies among the
// codes, the nearest code, the value of that, and whether it is inside of the codes' range, within
// half a step of its code.
template <typename V>
struct Latent {
    V position;
    V code;
    V value;
    decltype(V() < V()) inside;
};

// To the nearest whole number, to even where two are as near, from 0 to 2^22: floats of this size
// have no more fraction than that.
template <typename V>
EMBCOMPRESS_INLINE V round_to_whole(V value) {
    constexpr float kNoFraction = 8388608.0f;
    return (value + kNoFraction) - kNoFraction;
}

// The same operations as in embcompress/engine/quantization.py, so the same bits. `V` is a float or
// a vector of floats.
template <typename V>
EMBCOMPRESS_INLINE Latent<V> read_latent(V value, V step, const V* bias, int64_t bits) {
    const float last = static_cast<float>((1 << bits) - 1), middle = last / 2;
    const V zero = V{}, divisor = step == zero ? zero + FLT_MIN : step;
    Latent<V> latent;
    latent.position = bias == nullptr ? value / divisor + middle : (value - *bias) / divisor;
    latent.inside = (latent.position >= zero - 0.5f) & (latent.position <= zero + (last + 0.5f));
    // In this order a position that is NaN stays one.
    const V raised = latent.position < zero ? zero : latent.position;
    latent.code = round_to_whole<V>(zero + last < raised ? zero + last : raised);
    latent.value = bias == nullptr ? step * (latent.code - middle) : step * latent.code + *bias;
    return latent;
}

// Derivatives of the value by the step, whose code `zero` is 0, and by the bias: straight through
// the rounding (Esser et al., "Learned step size quantization", 2020, equation 3).
template <typename V>
EMBCOMPRESS_INLINE V derivative_by_step(const Latent<V>& latent, float zero) {
    return latent.code - (latent.inside ? latent.position : V{} + zero);
}

template <typename V>
EMBCOMPRESS_INLINE V derivative_by_bias(const Latent<V>& latent) {
    return latent.inside ? V{} : V{} + 1.0f;
}

}  // namespace embcompress
