// What is asked of the device itself: its limits, error flags that the host sees, plans in memory.

#include <mutex>

#include "kernels.h"
#include "launch.cuh"

namespace embcompress {
namespace cuda {
namespace {

__global__ void upload_kernel(const __grid_constant__ PlanPiece piece, int64_t* memory) {
    for (int w = static_cast<int>(threadIdx.x); w < piece.count; w += blockDim.x) {
        memory[w] = piece.words[w];
    }
}

}  // namespace

DeviceLimits device_limits() {
    int device = 0, multiprocessors = 1, shared = 0;
    check(cudaGetDevice(&device), "device_limits");
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
          "device_limits");
    check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlock, device),
          "device_limits");
    return {multiprocessors, shared};
}

Errors* error_flags() {
    static std::mutex mutex;
    static Errors* flags = nullptr;
    const std::lock_guard<std::mutex> lock(mutex);
    if (flags == nullptr) {
        void* memory = nullptr;
        check(cudaHostAlloc(&memory, sizeof(Errors), cudaHostAllocPortable | cudaHostAllocMapped),
              "error_flags");
        flags = new (memory) Errors{0, 0};
    }
    return flags;
}

void upload(const PlanWords& plan, int64_t* memory, cudaStream_t stream) {
    const int64_t count = static_cast<int64_t>(plan.words.size());
    for (int64_t begin = 0; begin < count; begin += kPieceWords) {
        PlanPiece piece;
        piece.count = static_cast<int32_t>(std::min<int64_t>(kPieceWords, count - begin));
        std::copy_n(plan.words.data() + begin, piece.count, piece.words);
        LaunchShape shape;
        shape.threads = 1024;
        launch("upload_kernel", upload_kernel, shape, stream, piece, memory + begin);
    }
}

void fill_zero(void* memory, int64_t bytes, cudaStream_t stream) {
    if (bytes > 0) check(cudaMemsetAsync(memory, 0, bytes, stream), "fill_zero");
}

}  // namespace cuda
}  // namespace embcompress
