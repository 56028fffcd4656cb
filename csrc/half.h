// The half precisions as they lie in memory, and their widening to float32, which is exact.
#pragma once

#include "philox.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace sda {

struct Bfloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

SDA_FN float widen(float x) { return x; }

SDA_FN float widen(Bfloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

SDA_FN float widen(Float16 x) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(x.bits));
#else
    // In integers, because the baseline processor has no instruction for it: the exponent moves by 112, which
    // a product does for denormals, too; infinity and NaN get the largest exponent.
    const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
    const uint32_t moved = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
    const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
    return bit_cast<float>(moved | special | static_cast<uint32_t>(x.bits & 0x8000) << 16);
#endif
}

}  // namespace sda
