// The reverse step of the diffusion, element by element, one text for C++ and CUDA.
//
//   raw     = a x - b eps,  x0 = clamp(raw, -1, 1) where clip
//   mean    = c1 x0 + c2 x
//   sigma   = noise_scale exp((high + low) / 4 + (high - low) / 4 v); without v: noise_scale exp(high / 2)
//   x_{t-1} = mean + sigma z + scale w (a cotangent - b through_network)
//
// Source: Ho et al. 2020, algorithm 2; Nichol and Dhariwal 2021, equation 15; Gao et al. 2023, algorithm 1.
// Where noise_scale is zero, neither z nor v matters. Products and sums are never fused: all backends give
// the same bits.
#pragma once

#include "exponential.h"
#include "pixels.h"
#include "status.h"
#include "step_table.h"

namespace sda {

// What a reverse step reads and writes. All pointers are on the device that computes.
struct ReverseStep {
    int64_t images;
    int64_t channels;
    int64_t pixels;
    int dtype;                  // of out and cotangent; x, noise and result are float32
    int through_network_dtype;  // dtype or float32, in which autograd delivers it
    bool learned;               // out holds v behind eps: twice the channels
    bool clip;
    Pixels x, out, noise, cotangent, through_network, result;  // noise and the guidance may be absent
    const float* table;                                        // [steps, kStepColumns]
    const int64_t* position;                                   // index into the table, counter of the noise
    const int64_t* identities;                                 // [images], where the noise is drawn
    const float* squares;                                      // [images], where there is guidance
    int64_t steps;
    uint64_t seed;
    float scale;
    bool joint;          // one norm for each norm_group consecutive images
    int64_t norm_group;  // at least 1
    int64_t real;        // images from here on are padding: their squares are taken as zero
};

constexpr int64_t kMaxImageElements = int64_t{1} << 30;

inline bool valid(const ReverseStep& s) {
    return (s.through_network_dtype == s.dtype || s.through_network_dtype == kFloat32) && s.images >= 0 &&
           s.channels >= 0 && s.pixels >= 0 && s.norm_group >= 1 && s.real >= 0 && s.real <= s.images &&
           (s.pixels == 0 || s.channels <= kMaxImageElements / s.pixels);
}

struct Coefficients {
    float a, b, c1, c2, low, high, noise_scale;
};

// The row of the table; NaN, and so is the result, where the index lies outside.
SDA_FN Coefficients coefficients(const ReverseStep& s) {
    const int64_t i = s.position[0];
    if (i < 0 || i >= s.steps) {
        const float nan = bit_cast<float>(0x7fc00000u);
        return {nan, nan, nan, nan, nan, nan, nan};
    }
    const float* row = s.table + i * kStepColumns;
    return {row[kSqrtRecipAlphasCumprod],
            row[kSqrtRecipm1AlphasCumprod],
            row[kPosteriorMeanCoef1],
            row[kPosteriorMeanCoef2],
            row[kLogVarianceLow],
            row[kLogVarianceHigh],
            row[kNoiseScale]};
}

SDA_FN float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}

// scale w of image n: w = 1 / norm, and zero where the norm is zero.
SDA_FN float guidance_weight(const ReverseStep& s, int64_t n) {
    float sum = 0.0f;
    if (s.joint) {
        const int64_t first = n / s.norm_group * s.norm_group;
        const int64_t last = first + s.norm_group < s.real ? first + s.norm_group : s.real;
        for (int64_t k = first; k < last; ++k) sum = add(sum, s.squares[k]);
    } else if (n < s.real) {
        sum = mul(static_cast<float>(s.norm_group), s.squares[n]);
    }
    const float norm = square_root(sum);
    return mul(s.scale, norm > 0.0f ? divide(1.0f, norm) : 0.0f);
}

SDA_FN float posterior_mean(const Coefficients& c, bool clip, float x, float eps) {
    float x0 = add(mul(c.a, x), -mul(c.b, eps));
    if (clip) {
        x0 = x0 < -1.0f ? -1.0f : x0;
        x0 = x0 > 1.0f ? 1.0f : x0;
    }
    return add(mul(c.c1, x0), mul(c.c2, x));
}

SDA_FN float learned_sigma(const Coefficients& c, float v) {
    const float middle = mul(add(c.high, c.low), 0.25f), reach = mul(add(c.high, -c.low), 0.25f);
    return mul(c.noise_scale, exponential(add(middle, mul(reach, v))));
}

SDA_FN float fixed_sigma(const Coefficients& c) { return mul(c.noise_scale, exponential(mul(0.5f, c.high))); }

SDA_FN float gradient(const Coefficients& c, float cotangent, float through_network) {
    return add(mul(c.a, cotangent), -mul(c.b, through_network));
}

}  // namespace sda
