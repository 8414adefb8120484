// CUDA's words on a CPU: a fiber for each thread of a block, which runs until it has to wait for others; blocks follow
// one another. Threads see each other's writes at once, so missing barriers between warps show only by luck.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // a block at a time
#define __restrict__

struct uint2 {
    unsigned x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};
struct Three {
    unsigned x, y, z;
};
static Three blockIdx, gridDim, blockDim;

namespace host {

struct Barrier {
    int arrived = 0, turn = 0;
};

struct Fiber {
    ucontext_t start;
    jmp_buf here;
    std::unique_ptr<char[]> stack;
    bool begun = false, done = false;
    const Barrier* waits_for = nullptr;
    int turn = 0;  // of the barrier that it waits for
    int parity = 0;
};

constexpr int STACK = 256 * 1024, MOST_THREADS = 1024;
static std::vector<Fiber> fibers(MOST_THREADS);
static int current, threads;
static jmp_buf scheduler;
static Barrier of_block, of_warp[MOST_THREADS / 32];
static void (*body)(void*);
static void* body_argument;

struct Slot {
    float numbers[12];
    uint64_t word;
};
static Slot exchange[2][MOST_THREADS];

static void begin() {
    body(body_argument);
    fibers[current].done = true;
    _longjmp(scheduler, 1);
}

static void wait(Barrier& barrier, int size) {
    if (++barrier.arrived == size) {
        barrier.arrived = 0, barrier.turn++;
        return;
    }
    Fiber& own = fibers[current];
    own.waits_for = &barrier, own.turn = barrier.turn;
    if (!_setjmp(own.here)) _longjmp(scheduler, 1);
}

static void resume(int thread) {
    current = thread;
    Fiber& fiber = fibers[thread];
    if (_setjmp(scheduler)) return;
    if (fiber.begun) _longjmp(fiber.here, 1);
    fiber.begun = true;
    getcontext(&fiber.start);
    if (!fiber.stack) fiber.stack.reset(new char[STACK]);
    fiber.start.uc_stack.ss_sp = fiber.stack.get(), fiber.start.uc_stack.ss_size = STACK;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, begin, 0);
    setcontext(&fiber.start);
}

static void run_block() {
    for (int i = 0; i < threads; i++) {
        Fiber& fiber = fibers[i];
        fiber.begun = fiber.done = false, fiber.waits_for = nullptr, fiber.parity = 0;
    }
    of_block = Barrier();
    for (Barrier& barrier : of_warp) barrier = Barrier();
    for (int left = threads; left;) {
        bool moved = false;
        for (int i = 0; i < threads; i++) {
            Fiber& fiber = fibers[i];
            if (fiber.done || (fiber.waits_for && fiber.waits_for->turn == fiber.turn)) continue;
            fiber.waits_for = nullptr, moved = true;
            resume(i);
            left -= fiber.done;
        }
        if (!moved) {
            std::fprintf(stderr, "threads of a block wait for each other for ever\n");
            std::abort();
        }
    }
}

// Every lane of a warp leaves something and then sees what the others left.
template <class Put>
static const Slot* trade(Put put) {
    const int thread = current, warp = thread / 32;
    const int parity = fibers[thread].parity ^= 1;  // the slots before may still be read
    put(exchange[parity][thread]);
    wait(of_warp[warp], std::min(32, threads - 32 * warp));
    return exchange[parity] + 32 * warp;
}

template <class T>
static T shuffle(T value, int from) {
    const Slot* slots = trade([&](Slot& slot) { std::memcpy(&slot.word, &value, sizeof(T)); });
    T result;
    std::memcpy(&result, &slots[from & 31].word, sizeof(T));
    return result;
}

template <class T>
static T from_slot(uint64_t slot) {
    T value;
    std::memcpy(&value, &slot, sizeof(T));
    return value;
}

template <class... A, size_t... I>
static void call(void (*kernel)(A...), const uint64_t* slots, std::index_sequence<I...>) {
    static_assert(((sizeof(A) == 8) && ...), "arguments of kernels have 8 bytes");
    kernel(from_slot<A>(slots[I])...);
}

template <class... A>
static void launch(void (*kernel)(A...), const unsigned* blocks, unsigned count, const uint64_t* slots) {
    gridDim = {blocks[0], blocks[1], blocks[2]}, blockDim = {count, 1, 1};
    threads = static_cast<int>(count);
    auto run = [&] { call(kernel, slots, std::index_sequence_for<A...>()); };
    body = [](void* argument) { (*static_cast<decltype(run)*>(argument))(); }, body_argument = &run;
    for (unsigned z = 0; z < blocks[2]; z++) {
        for (unsigned y = 0; y < blocks[1]; y++) {
            for (unsigned x = 0; x < blocks[0]; x++) {
                blockIdx = {x, y, z};
                run_block();
            }
        }
    }
}

struct Thread {
    struct X {
        operator int() const { return current; }
    } x;
};

}  // namespace host

static const host::Thread threadIdx;

#define __syncthreads() host::wait(host::of_block, host::threads)
#define __syncwarp() host::wait(host::of_warp[host::current / 32], std::min(32, host::threads - host::current / 32 * 32))
#define __shfl_sync(mask, value, from) host::shuffle(value, from)
#define __shfl_xor_sync(mask, value, distance) host::shuffle(value, (host::current & 31) ^ (distance))
#define __shfl_up_sync(mask, value, distance) \
    host::shuffle(value, (host::current & 31) < (distance) ? host::current & 31 : (host::current & 31) - (distance))
#define ENTRY(kernel)                                                                             \
    extern "C" void run_##kernel(const unsigned* blocks, unsigned count, const uint64_t* slots) { \
        host::launch(kernel, blocks, count, slots);                                               \
    }

static inline int atomicAdd(int* to, int more) { return (*to += more) - more; }
template <class T, class U>
static T bits_as(U value) {
    T result;
    static_assert(sizeof(T) == sizeof(U), "the same bits");
    std::memcpy(&result, &value, sizeof(T));
    return result;
}
static inline float __uint_as_float(unsigned bits) { return bits_as<float>(bits); }
static inline float __int_as_float(int bits) { return bits_as<float>(bits); }
static inline int __float_as_int(float number) { return bits_as<int>(number); }
