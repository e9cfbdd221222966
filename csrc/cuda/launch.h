// Launching kernels: by nvcc's syntax, or by the emulation on the CPU that the tests build.

#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "device_plan.h"

#if defined(EMBCOMPRESS_EMULATION)
#include "emulation.h"
#else
#include <cuda_runtime.h>
// Memory that the threads of a block share, of the size given at launch.
#define EMBCOMPRESS_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
// A pointer that is read or written so many bytes at once.
#define EMBCOMPRESS_ALIGNED(pointer, bytes) (pointer)
#endif

#define EMBCOMPRESS_DEVICE __device__ __forceinline__

namespace embcompress {
namespace cuda {




struct LaunchShape {
    int64_t blocks = 1;    // grid.x
    int64_t features = 1;  // grid.y
    int64_t chunks = 1;    // grid.z: pieces of the columns
    int threads = kThreads;
    int64_t shared_bytes = 0;
};

inline void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string("embcompress: CUDA failed in ") + what + ": " +
                             cudaGetErrorString(error));
}

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape,
            cudaStream_t stream, const Arguments&... arguments) {
    const dim3 grid(static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.features),
                    static_cast<unsigned>(shape.chunks));
    const dim3 block(static_cast<unsigned>(shape.threads));
    const size_t shared = static_cast<size_t>(shape.shared_bytes);
#if defined(EMBCOMPRESS_EMULATION)
    emulation::run(grid, block, shared, [&] { kernel(arguments...); });
    (void)stream;
#else
    kernel<<<grid, block, shared, stream>>>(arguments...);
#endif
    check(cudaGetLastError(), name);
}

}  // namespace cuda
}  // namespace embcompress
