// Faster code where the processor has wider vectors, out of one wheel for all processors.
#pragma once

#include <cstdint>

// Marks a free function that is compiled several times; the loader takes the best one that runs here. All of
// them compute the same bits, since nothing is fused or reordered. Other compilers and systems make one
// version.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && defined(__x86_64__) && \
    defined(__linux__) && defined(__GLIBC__)
#define SDA_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define SDA_CLONES
#endif

// What a clone calls must lie inside it.
#if defined(__GNUC__)
#define SDA_INLINE inline __attribute__((always_inline))
#else
#define SDA_INLINE inline
#endif
