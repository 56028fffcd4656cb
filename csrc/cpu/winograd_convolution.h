// 3x3 convolution by Winograd's minimal filtering F(2x2, 3x3), on processors with AVX512-BF16.
//
//   y = A^T [ sum_c (G w_c G^T) * (B^T d_c B) ] A
//
// for the 2x2 pixels y of a tile, from the 4x4 pixels d around it: 16 products of matrices where a direct
// convolution takes 36. In real numbers the result is the same. Source: Lavin and Gray, "Fast algorithms for
// convolutional neural networks", 2016, section 4.1.
#pragma once

#include <cstdint>

#include "../status.h"

namespace sda::cpu {

// Images are bfloat16 with their channels side by side, strides in elements. The kernels are G w G^T in
// bfloat16, [kernels / columns, 16, channels / 2, columns, 2]: the last axis and the third make a channel.
struct WinogradConvolution {
    int64_t images;
    int64_t height;    // even
    int64_t width;     // even
    int64_t channels;  // a multiple of 16
    int64_t kernels;   // a multiple of columns
    int64_t columns;   // kernels computed at once, 32 or 64
    const void* x;
    int64_t x_stride_image;
    int64_t x_stride_row;
    int64_t x_stride_pixel;
    const void* packed;
    const float* bias;  // [kernels], or null
    void* y;            // without gaps
};

// Whether this processor has the instructions.
bool winograd_convolution_runs();

// Bytes of workspace for as many threads.
int64_t winograd_convolution_workspace(const WinogradConvolution& c, int threads);

// Stride 1, one pixel of zeros around the image. What is transformed is rounded to bfloat16, sums are
// float32. The result does not depend on `threads`, nor an image's on the other ones. kBadArgument also where
// the instructions are missing.
int winograd_convolution(const WinogradConvolution& c, void* workspace, int threads);

}  // namespace sda::cpu
