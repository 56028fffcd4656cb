// Low-pass guidance: what its CPU and CUDA versions share.
//
//   raw = a x - b eps,  x0 = clamp(raw, -1, 1)               a, b = table[position[0]]
//   low = reference_down - P x0 P^T,  smooth = G low G       both [m, m] for each channel of each image
//   squares = <low, smooth>                                  ||phi(d)||^2, one number for each image
//   cotangent = P^T smooth P where -1 <= raw <= 1, else 0    S(d), masked
//
// with the cubic reduction P [m, n] by D = n / m and G = Q^T Q of the enlargement Q. Source: Gao et al.,
// "Back to the Source", CVPR 2023, algorithm 1; docs/architecture.md, "The guided step".
//
// P and G are banded. Row r of P lives on the 4D columns from D r - lead(D) on. Rows h of an image are
// counted as h + lead(D) = D q + k with 0 <= k < D: row h meets just the four rows q - 3 .. q of P, and so do
// all rows of its *group* q. The groups run from 1 to m + 1, of which the first and the last may be
// incomplete.
#pragma once

#include <cstdint>

#include "philox.h"
#include "status.h"
#include "step_table.h"

namespace sda {

struct ImageStrides {
    int64_t image, channel, row, column;
};

struct GuidanceTensors {
    int64_t images, channels;
    int64_t size, low;  // n and m
    int dtype;          // of out and cotangent; everything else is float32
    bool interleaved;   // cotangent is channels_last, else contiguous
    const float* x;
    ImageStrides x_strides;
    const void* out;  // the network's output, of which only the first `channels` channels are read
    ImageStrides out_strides;
    const float* reference_down;  // [images, channels, m, m], contiguous
    const float* down;            // P [m, n], contiguous
    const float* gram;            // G [m, m], contiguous
    const float* table;           // [steps, kStepColumns], contiguous
    int64_t steps;
    const int64_t* position;
    void* cotangent;
    float* squares;  // [images]
    float* x0;       // may be null
    ImageStrides x0_strides;
};

inline bool valid(const GuidanceTensors& t) {
    return t.images >= 0 && t.channels > 0 && t.low > 0 && t.size > 0 && t.size % t.low == 0;
}

constexpr int64_t kGramReach = 3;  // G[r, s] is zero for |r - s| > 3

SDA_FN int64_t lead(int64_t factor) { return 3 * factor / 2; }

struct Prediction {
    float a, b;
};

// NaN, and so are the squares, where the index lies outside of the table.
SDA_FN Prediction prediction_of(const GuidanceTensors& t) {
    const int64_t i = t.position[0];
    if (i < 0 || i >= t.steps) {
        const float nan = bit_cast<float>(0x7fc00000u);
        return {nan, nan};
    }
    const float* row = t.table + i * kStepColumns;
    return {row[kSqrtRecipAlphasCumprod], row[kSqrtRecipm1AlphasCumprod]};
}

SDA_FN float predict_raw(float a, float b, float x, float eps) { return add(mul(a, x), -mul(b, eps)); }

// raw lies in [-1, 1] where this changes nothing. NaN stays NaN, unlike with fmin and fmax.
SDA_FN float clamp_unit(float raw) {
    const float above = raw < -1.0f ? -1.0f : raw;
    return above > 1.0f ? 1.0f : above;
}

}  // namespace sda
