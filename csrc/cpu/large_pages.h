// Large pages for large results. The system hands out memory page by page, when it is first
// written: where the allocator has given the memory of the last result back, these faults cost more
// than the lookup itself.

#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace embcompress {

constexpr int64_t kLargeResult = 8 << 20;  // bytes; four of x86-64's large pages

// Asks for large pages in the middle of [data, data + bytes), where that is worth it. Advice only:
// where the system takes none, nothing changes.
inline void advise_large_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (bytes < kLargeResult) return;
    constexpr uintptr_t kPage = 2 << 20;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace embcompress
