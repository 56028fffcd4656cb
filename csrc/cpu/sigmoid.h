// The logistic function for loops over many elements: no division and no branch, fused multiplications and
// additions, which round once and so give the same bits on every processor.
#pragma once

#include <cstdint>

#include "../philox.h"
#include "clones.h"

namespace sda::cpu {

// 1 / (1 + e^-u) within 2 ulp; zero below -87.5, where it would be less than 1e-38; NaN for NaN.
SDA_INLINE float sigmoid(float u) {
    const bool vanishes = u < -87.5f;
    float x = vanishes ? 87.5f : -u;
    x = x < -87.0f ? -87.0f : x;
    // e^x = 2^n e^r with |r| <= ln 2 / 2, as in exponential.h; n is that of a normal number here.
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
    const float d = __builtin_fmaf(__builtin_fmaf(p, r, 1.0f), bit_cast<float>(power), 1.0f);
    // 1 / d: a guess within 13 % from the exponent, and three steps of Newton's iteration, each of which
    // squares the error.
    float y = bit_cast<float>(0x7EF311C7u - bit_cast<uint32_t>(d));
    y = __builtin_fmaf(y, __builtin_fmaf(-d, y, 1.0f), y);
    y = __builtin_fmaf(y, __builtin_fmaf(-d, y, 1.0f), y);
    y = __builtin_fmaf(y, __builtin_fmaf(-d, y, 1.0f), y);
    return vanishes ? 0.0f : y;
}

}  // namespace sda::cpu
