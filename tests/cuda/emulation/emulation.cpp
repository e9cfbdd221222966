// The scheduler of emulation.h, and what CUB does in csrc/cuda/sort.cu.

#include "emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../../csrc/cuda/kernels.h"

namespace emulation {

Place place;
unsigned char* shared_memory = nullptr;

void fail(const char* what) {
    // Not an exception: fibers have no caller that could catch it.
    std::fprintf(stderr, "emulation: %s (block %u %u %u, thread %u)\n", what, place.block.x,
                 place.block.y, place.block.z, place.thread.x);
    std::abort();
}

namespace {

constexpr std::size_t kStack = 96 << 10;
constexpr int kWarp = 32;

enum class State { kReady, kAtBlock, kAtLanes, kDone };

struct Fiber {
    jmp_buf here;
    ucontext_t first;  // how it is entered the first time
    std::vector<unsigned char> stack;
    bool started = false;
    State state = State::kReady;
    unsigned mask = 0;
    std::uint64_t value = 0;
    std::uint64_t received = 0;
    unsigned source = 0;  // the lane whose value it wants
    unsigned ballot = 0;
    unsigned thread = 0;
};

std::vector<Fiber> fibers;
Fiber* current = nullptr;
jmp_buf scheduler;
const std::function<void()>* body = nullptr;

void enter() {
    (*body)();
    current->state = State::kDone;
    _longjmp(scheduler, 1);
}

void leave(State state) {
    current->state = state;
    if (_setjmp(current->here) == 0) _longjmp(scheduler, 1);
}

void resume(Fiber& fiber) {
    current = &fiber;
    place.thread = dim3(fiber.thread, 0, 0);
    if (_setjmp(scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    setcontext(&fiber.first);
}

void prepare(Fiber& fiber, unsigned thread) {
    fiber.thread = thread;
    fiber.state = State::kReady;
    fiber.started = false;
    fiber.stack.resize(kStack);
    getcontext(&fiber.first);
    fiber.first.uc_stack.ss_sp = fiber.stack.data();
    fiber.first.uc_stack.ss_size = fiber.stack.size();
    fiber.first.uc_link = nullptr;
    makecontext(&fiber.first, enter, 0);
}

// Lanes of a warp that wait for each other go on once all of them have come.
bool release_lanes(std::size_t warp, std::size_t count) {
    bool released = false;
    const std::size_t begin = warp * kWarp, end = std::min(begin + kWarp, count);
    for (std::size_t i = begin; i < end; ++i) {
        if (fibers[i].state != State::kAtLanes) continue;
        const unsigned mask = fibers[i].mask;
        if ((mask >> (i - begin) & 1) == 0) fail("a lane waits for others, but not for itself");
        bool complete = true;
        for (std::size_t k = begin; k < begin + kWarp; ++k) {
            if ((mask >> (k - begin) & 1) == 0) continue;
            complete &= k < end && fibers[k].state == State::kAtLanes && fibers[k].mask == mask;
        }
        if (!complete) continue;
        unsigned ballot = 0;
        for (std::size_t k = begin; k < end; ++k) {
            if ((mask >> (k - begin) & 1) != 0 && fibers[k].value != 0) ballot |= 1u << (k - begin);
        }
        for (std::size_t k = begin; k < end; ++k) {
            if ((mask >> (k - begin) & 1) == 0) continue;
            const unsigned source = fibers[k].source;
            if (source >= kWarp || (mask >> source & 1) == 0) fail("a lane outside the mask");
            fibers[k].received = fibers[begin + source].value;
            fibers[k].ballot = ballot;
            fibers[k].state = State::kReady;
        }
        released = true;
    }
    return released;
}

void run_block(std::size_t count, bool backwards) {
    for (std::size_t i = 0; i < count; ++i) prepare(fibers[i], static_cast<unsigned>(i));
    while (true) {
        bool ran = false;
        for (std::size_t i = 0; i < count; ++i) {
            Fiber& fiber = fibers[backwards ? count - 1 - i : i];
            if (fiber.state != State::kReady) continue;
            resume(fiber);
            ran = true;
        }
        bool released = false;
        for (std::size_t warp = 0; warp * kWarp < count; ++warp) {
            released |= release_lanes(warp, count);
        }
        if (ran || released) continue;
        std::size_t done = 0, waiting = 0;
        for (std::size_t i = 0; i < count; ++i) {
            done += fibers[i].state == State::kDone;
            waiting += fibers[i].state == State::kAtBlock;
        }
        if (done == count) return;
        if (done + waiting < count) fail("lanes wait for others that never come");
        if (done > 0) fail("some threads of a block have left before its barrier");
        for (std::size_t i = 0; i < count; ++i) fibers[i].state = State::kReady;
    }
}

}  // namespace

void wait_for_block() { leave(State::kAtBlock); }

void wait_for_lanes(unsigned mask) { exchange(mask, 0, current->thread % kWarp); }

std::uint64_t exchange(unsigned mask, std::uint64_t value, unsigned source) {
    current->mask = mask;
    current->value = value;
    current->source = source;
    Fiber* self = current;
    leave(State::kAtLanes);
    return self->received;
}

unsigned ballot(unsigned mask, bool bit) {
    Fiber* self = current;
    exchange(mask, bit ? 1 : 0, current->thread % kWarp);
    return self->ballot;
}

void run(const dim3& grid, const dim3& block, std::size_t shared_bytes,
         const std::function<void()>& body_) {
    if (block.x == 0 || block.x > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
        grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535 || shared_bytes > (48u << 10)) {
        throw std::runtime_error("emulation: a launch that no device runs");
    }
    if (fibers.size() < block.x) fibers.resize(block.x);
    // Memory that nobody has written is not zero.
    std::vector<unsigned char> memory(shared_bytes + 16);
    shared_memory = memory.data() + (16 - reinterpret_cast<std::uintptr_t>(memory.data()) % 16);
    body = &body_;
    place.grid = grid;
    place.block_size = block;
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                place.block = dim3(x, y, z);
                std::fill(memory.begin(), memory.end(), 0xA5);
                run_block(block.x, (x + y + z) % 2 == 1);
            }
        }
    }
}

}  // namespace emulation

namespace embcompress {
namespace cuda {

size_t scratch_bytes(int64_t, int) { return 256; }

void sort_touches(void*, size_t, const int64_t* keys, int64_t* sorted_keys, const uint32_t* touches,
                  uint32_t* sorted_touches, int64_t count, int key_bits, cudaStream_t) {
    const uint64_t mask = key_bits >= 64 ? ~0ULL : (1ULL << key_bits) - 1;
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
        return (static_cast<uint64_t>(keys[a]) & mask) < (static_cast<uint64_t>(keys[b]) & mask);
    });
    for (int64_t i = 0; i < count; ++i) {
        sorted_keys[i] = keys[order[i]];
        sorted_touches[i] = touches[order[i]];
    }
}

void running_sum(void*, size_t, uint32_t* numbers, int64_t count, cudaStream_t) {
    std::partial_sum(numbers, numbers + count, numbers);
}

}  // namespace cuda
}  // namespace embcompress
