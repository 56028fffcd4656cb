// Splitting work over threads. Started per call: a thread costs some tens of microseconds, so callers ask for
// one only where it has a few hundred microseconds of work to do.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace sda::cpu {

// Calls body(begin, end) on disjoint ranges that cover [0, items), on at most `threads` threads, this one
// included, of at least `grain` items each. The body must not throw, and what it computes for an item must
// not depend on the range.
template <class Body>
void parallel_for(int64_t items, int64_t grain, int threads, const Body& body) {
    const int64_t parts =
        std::max<int64_t>(1, std::min<int64_t>(threads, items / std::max<int64_t>(1, grain)));
    const auto bound = [=](int64_t part) { return items / parts * part + std::min(part, items % parts); };
    std::vector<std::thread> workers;
    int64_t part = 1;
    try {
        workers.reserve(static_cast<size_t>(parts - 1));
        for (; part < parts; ++part) {
            workers.emplace_back([&body, first = bound(part), last = bound(part + 1)] { body(first, last); });
        }
    } catch (const std::system_error&) {
        // The system refuses another thread: this one does the rest.
    }
    body(int64_t{0}, bound(1));
    if (part < parts) body(bound(part), items);
    for (std::thread& worker : workers) worker.join();
}

}  // namespace sda::cpu
