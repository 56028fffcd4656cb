// Several elements that lie side by side, read or written at once.
#pragma once

#include "../narrow.h"

namespace sda::cuda {

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
    T values[kCount];
};

template <int kCount, class T>
__device__ void load(float (&to)[kCount], const T* from) {
    const auto pack = *reinterpret_cast<const Pack<T, kCount>*>(from);
#pragma unroll
    for (int v = 0; v < kCount; ++v) to[v] = widen(pack.values[v]);
}

template <int kCount, class T>
__device__ void store(T* to, const float (&from)[kCount]) {
    Pack<T, kCount> pack;
#pragma unroll
    for (int v = 0; v < kCount; ++v) pack.values[v] = narrow<T>(from[v]);
    *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
}

}  // namespace sda::cuda
