// From float32 to the precision in memory, rounded to nearest, ties to even. In integers, because the
// baseline processor has no instruction for it; without branches, so that the compiler vectorises it.
#pragma once

#include "../half.h"

namespace sda::cpu {

inline void narrow(float from, float* to) { *to = from; }

inline void narrow(float from, Bfloat16* to) {
    const uint32_t bits = bit_cast<uint32_t>(from);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to->bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

inline void narrow(float from, Float16* to) {
    const uint32_t bits = bit_cast<uint32_t>(from);
    const uint32_t magnitude = bits & 0x7fffffff;
    // Normal numbers: the exponent moves by 112. Below 2^-14 the sum with 1/2 rounds to the denormal's last
    // place.
    const uint32_t normal = (magnitude - 0x38000000 + 0x0fff + ((magnitude >> 13) & 1)) >> 13;
    const uint32_t denormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
    uint32_t rounded = magnitude < 0x38800000 ? denormal : normal;
    rounded = magnitude >= 0x477ff000 ? 0x7c00 : rounded;  // from 65520 on: infinity
    rounded = magnitude > 0x7f800000 ? 0x7e00 : rounded;   // NaN
    to->bits = static_cast<uint16_t>(rounded | ((bits >> 16) & 0x8000));
}

}  // namespace sda::cpu
