// Vectors of floats in registers, and which instruction set the kernels run on.

#pragma once

#include <cstring>
#include <type_traits>

#include "../plan.h"

#if defined(__GNUC__)
#define EMBCOMPRESS_INLINED __attribute__((always_inline))  // of lambdas
#else
#define EMBCOMPRESS_INLINED
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(EMBCOMPRESS_PORTABLE)
#define EMBCOMPRESS_X86  // instructions that compilers do not choose are written down
#endif

// One build runs on every x86-64 machine: the kernels are compiled for three instruction sets and
// the loader picks. Elsewhere the compiler's own target is used.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define EMBCOMPRESS_HAS_CLONES
#define EMBCOMPRESS_CLONES \
    __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EMBCOMPRESS_CLONES
#endif

namespace embcompress {

// `kLanes` floats in registers. A vector extension of GCC and clang, which rounds as scalars do.
template <int kLanes>
struct Lanes {
    typedef float Type __attribute__((vector_size(kLanes * sizeof(float))));
};
template <>
struct Lanes<1> {
    typedef float Type;
};

template <typename V>
EMBCOMPRESS_INLINE V load_lanes(const float* from) {
    V lanes;
    std::memcpy(&lanes, from, sizeof(V));
    return lanes;
}

template <typename V>
EMBCOMPRESS_INLINE void store_lanes(float* to, V lanes) {
    std::memcpy(to, &lanes, sizeof(V));
}

// Streaming writes whole lines of memory without reading them first, past the caches. What is
// written so is in its place for other threads only after end_streaming().
#if defined(EMBCOMPRESS_X86)
constexpr bool kCanStream = true;

// `to` is aligned to the vector.
template <typename V>
EMBCOMPRESS_INLINE void stream_lanes(float* to, V lanes) {
    auto& target = *reinterpret_cast<float (*)[sizeof(V) / sizeof(float)]>(to);
    if constexpr (sizeof(V) == 64) {
        asm volatile("vmovntps %1, %0" : "=m"(target) : "v"(lanes));
    } else if constexpr (sizeof(V) == 32) {
        asm volatile("vmovntps %1, %0" : "=m"(target) : "x"(lanes));
    } else if constexpr (sizeof(V) == 16) {
        asm volatile("movntps %1, %0" : "=m"(target) : "x"(lanes));
    } else {
        store_lanes(to, lanes);
    }
}

inline void end_streaming() { asm volatile("sfence" ::: "memory"); }
#else
constexpr bool kCanStream = false;

template <typename V>
EMBCOMPRESS_INLINE void stream_lanes(float* to, V lanes) {
    store_lanes(to, lanes);
}

inline void end_streaming() {}
#endif

template <typename V>
EMBCOMPRESS_INLINE void write_lanes(float* to, V lanes, bool streamed) {
    if (streamed) {
        stream_lanes(to, lanes);
    } else {
        store_lanes(to, lanes);
    }
}

// The floats of a register of the compiler's own target.
#if defined(__AVX512F__)
constexpr int kTargetLanes = 16;
#elif defined(__AVX__)
constexpr int kTargetLanes = 8;
#else
constexpr int kTargetLanes = 4;
#endif

#if defined(EMBCOMPRESS_HAS_CLONES)
template <typename F>
__attribute__((noinline, target("arch=x86-64-v4"))) auto run_with_16_lanes(const F& f) {
    return f(std::integral_constant<int, 16>{});
}

template <typename F>
__attribute__((noinline, target("arch=x86-64-v3"))) auto run_with_8_lanes(const F& f) {
    return f(std::integral_constant<int, 8>{});
}

inline int find_lanes() {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v4")) return 16;
    return __builtin_cpu_supports("x86-64-v3") ? 8 : kTargetLanes;
}
#endif

// f(lanes), compiled for the same instruction sets as EMBCOMPRESS_CLONES, each of which knows the
// floats of its registers: wider vectors are taken apart by the compiler and pass through memory.
template <typename F>
auto with_lanes(const F& f) {
#if defined(EMBCOMPRESS_HAS_CLONES)
    static const int lanes = find_lanes();
    if (lanes == 16) return run_with_16_lanes(f);
    if (lanes == 8) return run_with_8_lanes(f);
#endif
    return f(std::integral_constant<int, kTargetLanes>{});
}

// A call that may use `lanes` as a constant.
#define EMBCOMPRESS_WITH_LANES(...) \
    with_lanes([&](auto lanes) EMBCOMPRESS_INLINED { return __VA_ARGS__; })

}  // namespace embcompress
