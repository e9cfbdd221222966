// Memory that begins where a line of the caches does: no vector of it lies in two of them.

#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace embcompress {

constexpr size_t kLineBytes = 64;
constexpr int64_t kLineFloats = kLineBytes / sizeof(float);

template <typename T>
struct LineAllocator {
    typedef T value_type;

    LineAllocator() = default;
    template <typename U>
    LineAllocator(const LineAllocator<U>&) {}

    T* allocate(size_t count) {
        return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(kLineBytes)));
    }
    void deallocate(T* memory, size_t) { ::operator delete(memory, std::align_val_t(kLineBytes)); }
    bool operator==(const LineAllocator&) const { return true; }
    bool operator!=(const LineAllocator&) const { return false; }
};

typedef std::vector<float, LineAllocator<float>> LineFloats;

}  // namespace embcompress
