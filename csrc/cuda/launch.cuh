// Launching kernels: by nvcc's syntax, or by the emulation on the CPU that the tests build.

#pragma once

#include <cstdint>

#include "device_plan.h"
#include "runtime.h"

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
    // clang-format off
    kernel<<<grid, block, shared, stream>>>(arguments...);
    // clang-format on
#endif
    check(cudaGetLastError(), name);
}

}  // namespace cuda
}  // namespace embcompress
