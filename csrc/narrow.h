// Rounding float32 to the half precisions, to nearest with ties to even.
#pragma once

#include "half.h"

namespace sda {

template <class To>
SDA_FN To narrow(float x);

template <>
SDA_FN float narrow<float>(float x) {
    return x;
}

template <>
SDA_FN Bfloat16 narrow<Bfloat16>(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<uint16_t>(nan ? 0x7fc0u : rounded)};
}

template <>
SDA_FN Float16 narrow<Float16>(float x) {
#if defined(__CUDA_ARCH__)
    return {__half_as_ushort(__float2half_rn(x))};
#else
    // In integers, because the baseline processor has no instruction for it. Below 2^-14 a sum with 1/2
    // rounds at the last place of the denormals; from 65520 on everything is infinite.
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t denormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    uint32_t half = magnitude < 0x38800000u ? denormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    return {static_cast<uint16_t>(half | (bits >> 16 & 0x8000u))};
#endif
}

}  // namespace sda
