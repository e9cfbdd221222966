// Sorting and running sums, by CUB, which ships with the toolkit.

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>

#include "kernels.h"

namespace embcompress {
namespace cuda {

size_t scratch_bytes(int64_t touches, int key_bits) {
    size_t sort = 0, sum = 0;
    const int64_t* keys = nullptr;
    const uint32_t* numbers = nullptr;
    int64_t* sorted_keys = nullptr;
    uint32_t* sorted = nullptr;
    check(cub::DeviceRadixSort::SortPairs(nullptr, sort, keys, sorted_keys, numbers, sorted,
                                          touches, 0, key_bits),
          "scratch_bytes");
    check(cub::DeviceScan::InclusiveSum(nullptr, sum, sorted, sorted, touches), "scratch_bytes");
    return std::max(sort, sum);
}

void sort_touches(void* scratch, size_t bytes, const int64_t* keys, int64_t* sorted_keys,
                  const uint32_t* touches, uint32_t* sorted_touches, int64_t count, int key_bits,
                  cudaStream_t stream) {
    check(cub::DeviceRadixSort::SortPairs(scratch, bytes, keys, sorted_keys, touches,
                                          sorted_touches, count, 0, key_bits, stream),
          "sort_touches");
}

void running_sum(void* scratch, size_t bytes, uint32_t* numbers, int64_t count,
                 cudaStream_t stream) {
    check(cub::DeviceScan::InclusiveSum(scratch, bytes, numbers, numbers, count, stream),
          "running_sum");
}

}  // namespace cuda
}  // namespace embcompress
