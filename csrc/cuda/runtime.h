// The CUDA runtime library, or its emulation on the CPU that the tests build.

#pragma once

#include <stdexcept>
#include <string>

#if defined(EMBCOMPRESS_EMULATION)
#include "emulation.h"
#else
#include <cuda_runtime.h>
// Memory that the threads of a block share, of the size given at launch.
#define EMBCOMPRESS_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
// What the emulation checks and a device traps on.
#define EMBCOMPRESS_CHECK_ALIGNED(pointer, bytes) static_cast<void>(0)
#endif

namespace embcompress {
namespace cuda {

inline void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string("embcompress: CUDA failed in ") + what + ": " +
                             cudaGetErrorString(error));
}

}  // namespace cuda
}  // namespace embcompress
