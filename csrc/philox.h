// Counter-based normal noise, one text for C++ and CUDA.
//
//   words   = Philox4x32-10(key = seed, counter = (block, step, identity_lo, identity_hi))
//   u(w)    = ((w >> 9) + 1/2) 2^-23                               in (0, 1), exact in float32
//   normals = sqrt(-2 ln u(w0)) (cos, sin)(2 pi u(w1)), and the same with w2, w3
//
// for elements 4 block .. 4 block + 3 of an image. Source: Salmon, Moraes, Dror and Shaw, "Parallel random
// numbers: as easy as 1, 2, 3", SC 2011, section 3.3 and table 2; Box and Muller, 1958.
//
// Logarithm, sine and cosine are polynomials of ours, evaluated with separately rounded products and sums,
// never with fused ones: so the CPU, CUDA and Triton versions give the same bits on every machine, the
// compiler can vectorise them, and nothing depends on a math library. Every normal lies within 3 ulp of the
// exact formula.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SDA_FN __host__ __device__ __forceinline__
#else
#define SDA_FN inline
#endif

namespace sda {

struct Words {
    uint32_t w0, w1, w2, w3;
};

struct Normals {
    float n0, n1, n2, n3;
};

SDA_FN Words philox4x32(uint64_t seed, uint32_t block, uint32_t step, uint64_t identity) {
    uint32_t key0 = static_cast<uint32_t>(seed);
    uint32_t key1 = static_cast<uint32_t>(seed >> 32);
    Words c{block, step, static_cast<uint32_t>(identity), static_cast<uint32_t>(identity >> 32)};
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t{0xD2511F53u} * c.w0;
        const uint64_t product1 = uint64_t{0xCD9E8D57u} * c.w2;
        c = {static_cast<uint32_t>(product1 >> 32) ^ c.w1 ^ key0, static_cast<uint32_t>(product1),
             static_cast<uint32_t>(product0 >> 32) ^ c.w3 ^ key1, static_cast<uint32_t>(product0)};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return c;
}

// Products and sums that no compiler may contract into a fused operation. (The host code is compiled with
// -ffp-contract=off.)
SDA_FN float mul(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

SDA_FN float add(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

SDA_FN float square_root(float x) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(x);
#else
    return std::sqrt(x);
#endif
}

template <class To, class From>
SDA_FN To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

// ln u for u in [2^-24, 1): u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), ln(1+f) = f - f^2/2 + f^3
// P(f). P is the minimax polynomial of degree 7 for the relative error of ln(1+f), 5.8e-9.
SDA_FN float log_unit(float u) {
    constexpr int32_t kSqrtHalfBits = 0x3f3504f3;
    const int32_t shifted = bit_cast<int32_t>(u) - kSqrtHalfBits;
    const float e = static_cast<float>(shifted >> 23);
    const float f = add(bit_cast<float>((shifted & 0x007fffff) + kSqrtHalfBits), -1.0f);
    float p = -0.0763450292f;
    p = add(mul(p, f), 0.1276157735f);
    p = add(mul(p, f), -0.1316018046f);
    p = add(mul(p, f), 0.14201758f);
    p = add(mul(p, f), -0.1662335754f);
    p = add(mul(p, f), 0.2000122687f);
    p = add(mul(p, f), -0.2500082103f);
    p = add(mul(p, f), 0.3333333171f);
    const float square = mul(f, f);
    float tail = mul(mul(square, f), p);
    tail =
        add(tail, mul(e, -2.12194440e-4f));  // ln 2 = 0.693359375 - 2.1219444e-4; e times the first is exact
    tail = add(tail, mul(square, -0.5f));
    return add(add(f, tail), mul(e, 0.693359375f));
}

// cos and sin of 2 pi u(w). The angle is reduced to [-1/8, 1/8] turns in integers, hence exactly; the
// polynomials in turns^2 are minimax, with relative errors 3.6e-9 (sine) and 5.4e-11 (cosine).
SDA_FN void cos_sin_turns(uint32_t w, float* cosine, float* sine) {
    const int32_t k = static_cast<int32_t>(w >> 9);
    const int32_t quadrant = (k + (1 << 20)) >> 21;
    const float turns = mul(add(static_cast<float>(k - (quadrant << 21)), 0.5f), 0x1p-23f);
    const float z = mul(turns, turns);
    float p = -75.45339669f;
    p = add(mul(p, z), 81.59393696f);
    p = add(mul(p, z), -41.34167316f);
    const float s = mul(turns, add(mul(p, z), 6.283185307f));
    float q = 59.24596395f;
    q = add(mul(q, z), -85.44374172f);
    q = add(mul(q, z), 64.93932647f);
    q = add(mul(q, z), -19.73920869f);
    const float c = add(mul(q, z), 1.0f);
    const bool swap = (quadrant & 1) != 0;
    const uint32_t sign_cosine = static_cast<uint32_t>((quadrant + 1) & 2) << 30;
    const uint32_t sign_sine = static_cast<uint32_t>(quadrant & 2) << 30;
    *cosine = bit_cast<float>(bit_cast<uint32_t>(swap ? s : c) ^ sign_cosine);
    *sine = bit_cast<float>(bit_cast<uint32_t>(swap ? c : s) ^ sign_sine);
}

SDA_FN void box_muller(uint32_t w_radius, uint32_t w_angle, float* first, float* second) {
    const float u = mul(add(static_cast<float>(static_cast<int32_t>(w_radius >> 9)), 0.5f), 0x1p-23f);
    const float radius = square_root(mul(-2.0f, log_unit(u)));
    float cosine, sine;
    cos_sin_turns(w_angle, &cosine, &sine);
    *first = mul(radius, cosine);
    *second = mul(radius, sine);
}

// The noise of elements 4 block .. 4 block + 3 of the image `identity` at `step`.
SDA_FN Normals philox_normals(uint64_t seed, uint32_t block, uint32_t step, uint64_t identity) {
    const Words w = philox4x32(seed, block, step, identity);
    Normals n;
    box_muller(w.w0, w.w1, &n.n0, &n.n1);
    box_muller(w.w2, w.w3, &n.n2, &n.n3);
    return n;
}

}  // namespace sda
