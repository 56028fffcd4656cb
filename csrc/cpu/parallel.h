// Splitting work over threads: those of the OpenMP runtime that the process has loaded, as PyTorch brings
// one, else threads of our own, started per call for some tens of microseconds. Threads of the runtime spin
// for milliseconds after each of their tasks; beside them ours would get half a processor.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace sda::cpu {

// What compilers call for `#pragma omp parallel`; all runtimes on Linux have it.
using OpenMpParallel = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

// Null where no runtime was loaded for the whole process before the first call.
inline OpenMpParallel openmp_parallel() {
#if defined(__linux__)
    static const auto found = reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
#else
    return nullptr;
#endif
}

// Calls work() on at most `threads` threads at once, this one included, and waits for all of them.
template <class Work>
void on_threads(int64_t threads, const Work& work) {
    if (threads > 1 && openmp_parallel() != nullptr) {
        const auto call = [](void* data) { (*static_cast<const Work*>(data))(); };
        openmp_parallel()(call, const_cast<Work*>(&work), static_cast<unsigned>(threads), 0);
        return;
    }
    std::vector<std::thread> others;
    try {
        others.reserve(static_cast<size_t>(threads - 1));
        for (int64_t i = 1; i < threads; ++i) others.emplace_back([&work] { work(); });
    } catch (const std::exception&) {
        // The system refuses another thread: the ones there are do its work.
    }
    work();
    for (std::thread& other : others) other.join();
}

// Calls body(task) for every task of [0, tasks) on at most `threads` threads. A thread takes the next one
// when it is done with its last, so that none waits for one that the system disturbs. The body must not
// throw.
template <class Body>
void for_tasks(int64_t tasks, int64_t threads, const Body& body) {
    std::atomic<int64_t> next{0};
    on_threads(std::max<int64_t>(1, std::min(tasks, threads)), [&] {
        for (int64_t task = next++; task < tasks; task = next++) body(task);
    });
}

// Calls body(begin, end) on disjoint ranges that cover [0, items), on at most `threads` threads with at least
// `grain` items each. What it computes for an item must not depend on the range.
template <class Body>
void parallel_for(int64_t items, int64_t grain, int threads, const Body& body) {
    constexpr int64_t kRangesPerThread = 4;
    const int64_t worth =
        std::max<int64_t>(1, std::min<int64_t>(threads, items / std::max<int64_t>(1, grain)));
    const int64_t ranges = worth == 1 ? 1 : std::min(items, worth * kRangesPerThread);
    for_tasks(ranges, worth,
              [&](int64_t range) { body(items * range / ranges, items * (range + 1) / ranges); });
}

}  // namespace sda::cpu
