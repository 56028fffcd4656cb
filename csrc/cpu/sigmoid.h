// The logistic function for loops over many elements: no branch and no mask, whose chains of instructions
// would fill the processor's queues, and fused multiplications and additions, which round once and so give
// the same bits on every processor.
#pragma once

#include <cstdint>

#include "../philox.h"
#include "clones.h"

namespace sda::cpu {

// 1 / (1 + e^-u) within 3 ulp; zero below -88.37, where it would be less than 5e-39. For NaN some number:
// what is multiplied by u is NaN then.
SDA_INLINE float sigmoid(float u) {
    // x = -u between -87 and 89, by its bits: positive numbers order as integers, negative ones the other
    // way.
    const int32_t bits = static_cast<int32_t>(bit_cast<uint32_t>(u) ^ 0x80000000u);
    constexpr int32_t kMost = 0x42B20000;     // 89
    constexpr uint32_t kLeast = 0xC2AE0000u;  // -87
    const uint32_t below = static_cast<uint32_t>(bits < kMost ? bits : kMost);
    const float x = bit_cast<float>(below < kLeast ? below : kLeast);
    // e^x = 2^n e^r with |r| <= ln 2 / 2, as in exponential.h; n is that of a normal number, or 128, where
    // the power is infinite.
    constexpr float kMagic = 12582912.0f;  // 1.5 2^23: adding it rounds to an integer
    const float shifted = __builtin_fmaf(x, 1.44269504f, kMagic);
    const float n = shifted - kMagic;
    float r = __builtin_fmaf(n, -0.693359375f, x);
    r = __builtin_fmaf(n, 2.12194440e-4f, r);
    float p = 0.001381314463f;
    p = __builtin_fmaf(p, r, 0.008369418856f);
    p = __builtin_fmaf(p, r, 0.04166845679f);
    p = __builtin_fmaf(p, r, 0.1666651479f);
    p = __builtin_fmaf(p, r, 0.4999999305f);
    p = __builtin_fmaf(p, r, 1.0f);
    const uint32_t power = (bit_cast<uint32_t>(shifted) - 0x4B400000u + 127u) << 23;
    return 1.0f / __builtin_fmaf(__builtin_fmaf(p, r, 1.0f), bit_cast<float>(power), 1.0f);
}

}  // namespace sda::cpu
