// CUDA on the CPU, for tests: every thread of a block is a fiber that runs until it has to wait for
// others. What is emulated is what the kernels of csrc/cuda use, and nothing else.
//
// Stricter than a GPU: accesses of 16 and 8 bytes must be aligned, a barrier that some of its
// threads never reach is an error, and lanes between two barriers run one after the other, from the
// last to the first in every other block, so that a missing barrier changes results.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint2 {
    unsigned x, y;
};
struct float2 {
    float x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};
struct float4 {
    float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulation {

struct Place {
    dim3 thread, block, block_size, grid;
};

// Of the running fiber.
extern Place place;
extern unsigned char* shared_memory;

// Runs a kernel: `body` once for every thread of every block.
void run(const dim3& grid, const dim3& block, std::size_t shared_bytes,
         const std::function<void()>& body);

void wait_for_block();
void wait_for_lanes(unsigned mask);
// The value that lane `source` of the warp hands in.
std::uint64_t exchange(unsigned mask, std::uint64_t value, unsigned source);
// Which lanes of the warp hand in a one.
unsigned ballot(unsigned mask, bool bit);

void fail(const char* what);

inline void check_aligned(const void* pointer, std::size_t bytes) {
    if (reinterpret_cast<std::uintptr_t>(pointer) % bytes != 0) fail("an access is not aligned");
}

}  // namespace emulation

#define threadIdx (emulation::place.thread)
#define blockIdx (emulation::place.block)
#define blockDim (emulation::place.block_size)
#define gridDim (emulation::place.grid)

inline void __syncthreads() { emulation::wait_for_block(); }
inline void __syncwarp(unsigned mask) { emulation::wait_for_lanes(mask); }
template <typename T>
T exchange_any(unsigned mask, T value, unsigned source) {
    static_assert(sizeof(T) <= sizeof(std::uint64_t), "as a shuffle of CUDA");
    std::uint64_t word = 0;
    std::memcpy(&word, &value, sizeof(T));
    word = emulation::exchange(mask, word, source);
    std::memcpy(&value, &word, sizeof(T));
    return value;
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
    return exchange_any(mask, value, threadIdx.x % 32 ^ static_cast<unsigned>(distance));
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width) {
    const unsigned lanes = static_cast<unsigned>(width), lane = threadIdx.x % 32;
    return exchange_any(mask, value,
                        (lane & ~(lanes - 1)) + (static_cast<unsigned>(from) & (lanes - 1)));
}
inline unsigned __ballot_sync(unsigned mask, bool bit) { return emulation::ballot(mask, bit); }
template <typename T>
T __ldg(const T* from) {
    return *from;
}
inline float atomicAdd(float* to, float value) {
    const float before = *to;
    *to = before + value;
    return before;
}

#define EMBCOMPRESS_SHARED(name) unsigned char* name = emulation::shared_memory
#define EMBCOMPRESS_CHECK_ALIGNED(pointer, bytes) emulation::check_aligned(pointer, bytes)

// ---------------------------------------------------------------------------- runtime library

typedef int cudaError_t;
typedef struct EmulatedStream* cudaStream_t;
constexpr cudaError_t cudaSuccess = 0;
enum { cudaHostAllocPortable = 1, cudaHostAllocMapped = 2 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlock };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };

inline const char* cudaGetErrorString(cudaError_t) { return "an emulated error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
// A small device, so that grids stride over their work in tests too.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? 1 : 48 << 10;
    return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** memory, std::size_t bytes, unsigned) {
    *memory = std::malloc(bytes);
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t) {
    std::memset(memory, value, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
