// Asking for memory before it is needed.
#pragma once

#include <cstdint>

namespace sda::cpu {

constexpr int64_t kCacheLine = 64;

// Starts to load `count` bytes from `data` on into the caches. Any address will do, also beyond an
// allocation.
inline void prefetch(const char* data, int64_t count) {
#if defined(__GNUC__)
    for (int64_t i = 0; i < count; i += kCacheLine) __builtin_prefetch(data + i);
#else
    (void)data, (void)count;
#endif
}

// The same for floats that will be written.
inline void prefetch_to_write(const float* data, int64_t count) {
#if defined(__GNUC__)
    for (int64_t i = 0; i < count; i += kCacheLine / 4) __builtin_prefetch(data + i, 1);
#else
    (void)data, (void)count;
#endif
}

}  // namespace sda::cpu
