// As much of the CUDA runtime as csrc/cuda uses, on a CPU: its kernels run, one block after another and every
// thread of a block as a fiber, from barrier to barrier in an order of our choice. What a missing barrier
// breaks then differs from one order to another; what a kernel reads or writes beside a tensor or its dynamic
// shared memory, and vector accesses that are not aligned, the compiler's sanitizers find. Whatever CUDA
// forbids and this notices aborts.
//
// Not here: other blocks at the same time, warps, fused products and sums, the device's own conversions to
// float16.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // a block is alone; dynamic shared memory is rewritten to emulator::shared_memory
#define __syncthreads() emulator::barrier(__FILE__, __LINE__)

struct alignas(16) float4 {
    float x, y, z, w;
};

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = void*;

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulator {

constexpr size_t kSharedUnasked = 48 << 10, kSharedMost = 99 << 10;  // of sm_86 and sm_89, the smallest
constexpr size_t kStack = 256 << 10;

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    const char* file = nullptr;  // of the barrier it waits at
    int line = 0;
    bool finished = false;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned running = 0;
inline std::function<void()> body;
inline char* shared = nullptr;
inline cudaError_t last_error = cudaSuccess;
inline std::map<const void*, size_t> shared_allowed;

[[noreturn]] inline void fail(const std::string& reason) {
    std::fprintf(stderr, "CUDA emulator: %s (block %u, %u)\n", reason.c_str(), blockIdx.x, blockIdx.y);
    std::abort();
}

inline void barrier(const char* file, int line) {
    Fiber& fiber = fibers[running];
    fiber.file = file;
    fiber.line = line;
    swapcontext(&fiber.context, &scheduler);
}

inline void run_fiber() {
    body();
    fibers[running].finished = true;
    swapcontext(&fibers[running].context, &scheduler);
}

template <class T>
T* shared_memory() {
    return reinterpret_cast<T*>(shared);
}

// 0 .. count - 1 as EMULATOR_ORDER says: ascending, descending or shuffled.
inline std::vector<unsigned> order_of(unsigned count, std::mt19937& random) {
    std::vector<unsigned> order(count);
    std::iota(order.begin(), order.end(), 0u);
    const char* variable = std::getenv("EMULATOR_ORDER");
    const std::string name = variable == nullptr ? "ascending" : variable;
    if (name == "descending") std::reverse(order.begin(), order.end());
    if (name == "shuffled") std::shuffle(order.begin(), order.end(), random);
    return order;
}

inline void run_block(unsigned threads, std::mt19937& random) {
    if (fibers.size() < threads) fibers.resize(threads);
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.finished = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_fiber, 0);
    }
    for (unsigned finished = 0; finished < threads;) {
        for (const unsigned i : order_of(threads, random)) {
            if (fibers[i].finished) continue;
            running = i;
            threadIdx = dim3(i, 0, 0);
            swapcontext(&scheduler, &fibers[i].context);
            finished += fibers[i].finished;
        }
        if (finished != 0 && finished != threads) fail("some threads ended while others wait at a barrier");
        for (unsigned i = 1; i < threads && finished == 0; ++i) {
            if (fibers[i].line != fibers[0].line || std::strcmp(fibers[i].file, fibers[0].file) != 0) {
                fail("threads wait at different barriers");
            }
        }
    }
}

inline void run_grid(dim3 grid, dim3 block, size_t bytes, const void* kernel) {
    const auto allowed = shared_allowed.find(kernel);
    const size_t most = allowed == shared_allowed.end() ? kSharedUnasked : allowed->second;
    const bool grid_fits = grid.x - 1 < INT32_MAX && grid.y - 1 < 65535 && grid.z == 1;
    const bool block_fits = block.x - 1 < 1024 && block.y == 1 && block.z == 1;
    if (!grid_fits || !block_fits || bytes > most) {
        last_error = cudaErrorInvalidConfiguration;
        return;
    }
    gridDim = grid;
    blockDim = block;
    std::mt19937 random(0);
    const uint64_t blocks = uint64_t{grid.x} * grid.y;
    for (const unsigned i : order_of(static_cast<unsigned>(blocks), random)) {
        blockIdx = dim3(i % grid.x, i / grid.x, 0);
        const std::unique_ptr<char[]> memory(new char[bytes]);
        std::memset(memory.get(), 0xff, bytes);  // NaN, until the block writes
        shared = memory.get();
        run_block(block.x, random);
    }
}

template <class... Parameters>
auto launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t bytes = 0, cudaStream_t = nullptr) {
    return [=](Parameters... arguments) {
        body = [=] { kernel(arguments...); };
        run_grid(grid, block, bytes, reinterpret_cast<const void*>(kernel));
    };
}

}  // namespace emulator

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int value) {
    if (value < 0 || static_cast<size_t>(value) > emulator::kSharedMost) return cudaErrorInvalidValue;
    emulator::shared_allowed[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(value);
    return cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
    const cudaError_t error = emulator::last_error;
    emulator::last_error = cudaSuccess;
    return error;
}

inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : "invalid argument";
}

template <class T>
T atomicAdd(T* to, T value) {
    const T before = *to;
    *to += value;
    return before;
}

template <class T>
T __ldcg(const T* from) {
    return *from;
}

inline void __threadfence() {}

inline int min(int a, int b) { return std::min(a, b); }
inline int max(int a, int b) { return std::max(a, b); }
