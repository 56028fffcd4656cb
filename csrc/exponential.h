// The exponential function, one text for C++ and CUDA: a polynomial of ours, for the reasons given in
// philox.h.
#pragma once

#include "philox.h"

namespace sda {

// e^x within 1 ulp; infinite from 88.73 on, denormal and at last zero below -87.33, NaN for NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2, e^r = 1 + r + r^2 P(r). P is the minimax polynomial of degree 4 for
// the relative error of e^r, 3.3e-9.
SDA_FN float exponential(float x) {
    x = x < -104.0f ? -104.0f : x;
    x = x > 89.0f ? 89.0f : x;
    // Adding 1.5 2^23 rounds to an integer, and 254 is twice the bias of a float's exponent.
    constexpr float kMagic = 12582912.0f + 254.0f;
    const float shifted = add(mul(x, 1.44269504f), kMagic);
    const float n = add(shifted, -kMagic);
    float r = add(x, mul(n, -0.693359375f));  // ln 2 = 0.693359375 - 2.1219444e-4; n times the first is exact
    r = add(r, mul(n, 2.12194440e-4f));
    float p = 0.001381314463f;
    p = add(mul(p, r), 0.008369418856f);
    p = add(mul(p, r), 0.04166845679f);
    p = add(mul(p, r), 0.1666651479f);
    p = add(mul(p, r), 0.4999999305f);
    const float y = add(add(r, mul(mul(r, r), p)), 1.0f);
    // Times 2^n in two halves, each of which is a normal number.
    // The lowest bits of `shifted` are n + 254; what stands above them, halved, leaves at the top.
    const uint32_t bits = bit_cast<uint32_t>(shifted), half = bits >> 1;
    return mul(mul(y, bit_cast<float>(half << 23)), bit_cast<float>((bits - half) << 23));
}

}  // namespace sda
