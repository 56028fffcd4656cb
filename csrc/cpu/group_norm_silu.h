// GroupNorm, scale and shift per image, and SiLU in one, and their derivative, on the CPU.
//
//   u  = (x - mean) A + B,   A = rstd weight (1 + scale),   B = bias (1 + scale) + shift
//   y  = u sigmoid(u)
//   dx = A du + K (x - mean) + M,   du = dy sigmoid(u) (1 + u (1 - sigmoid(u)))
//   K  = -rstd^2 / m  sum A du (x - mean),   M = -1 / m  sum A du
//
// with mean, rstd and the sums over the m elements of a group, x having been raised by x_bias. Source: Wu and
// He, "Group normalization", 2018, equations 1 to 3; scale and shift as in Dhariwal and Nichol, 2021 (AdaGN,
// section 3.1).
#pragma once

#include <cstdint>

#include "../status.h"

namespace sda::cpu {

// A batch seen as [images, channels, spatial], strides in elements; one of the last two is 1, and where it is
// stride_spatial, the channels lie side by side: stride_channel = spatial.
struct NormLayout {
    int64_t images;
    int64_t channels;
    int64_t spatial;
    int64_t stride_image;
    int64_t stride_channel;
    int64_t stride_spatial;
};

struct NormParameters {
    const float* weight;  // [channels]
    const float* bias;    // [channels]
    const float* scale;   // [images, channels], or null
    const float* shift;   // the same
    const float* x_bias;  // [channels], or null
    int64_t stride_scale;
    int64_t stride_shift;
    int64_t groups;
    bool silu;
};

// Bytes of workspace, aligned for float32, that either function needs for images with this layout on as many
// threads.
int64_t group_norm_silu_workspace(const NormLayout& where, int threads);

// Writes y and the statistics float32 [images, groups]. x and y have dtype code `dtype`, the same sizes and
// the same kind of layout. The result does not depend on `threads`, nor an image's on the other ones.
int group_norm_silu(const void* x, void* y, float* mean, float* rstd, int dtype, const NormLayout& where_x,
                    const NormLayout& where_y, const NormParameters& parameters, double eps, void* workspace,
                    int threads);

// Writes the gradient with respect to x, from that with respect to y and the statistics, plus `residual`,
// which is null or like x.
int group_norm_silu_backward(const void* dy, const void* x, void* dx, const void* residual, const float* mean,
                             const float* rstd, int dtype, const NormLayout& where_dy,
                             const NormLayout& where_x, const NormLayout& where_dx,
                             const NormLayout& where_residual, const NormParameters& parameters,
                             void* workspace, int threads);

}  // namespace sda::cpu
