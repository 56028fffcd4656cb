#include "group_norm_silu.h"

#include "group_norm_silu_layouts.h"

namespace sda::cpu {
namespace {

bool same_kind(const NormLayout& a, const NormLayout& b) {
    return a.images == b.images && a.channels == b.channels && a.spatial == b.spatial &&
           channels_last(a) == channels_last(b);
}

bool valid(const NormLayout& where, const NormParameters& p) {
    return where.images >= 0 && where.channels > 0 && where.spatial > 0 && p.groups > 0 &&
           where.channels % p.groups == 0;
}

}  // namespace

int64_t group_norm_silu_workspace(const NormLayout& where, int threads) {
    if (!channels_last(where) || where.images <= 0 || where.channels <= 0 || where.spatial <= 0) return 0;
    return channels_last_floats(where, threads) * static_cast<int64_t>(sizeof(float));
}

int group_norm_silu(const void* x, void* y, float* mean, float* rstd, int dtype, const NormLayout& where_x,
                    const NormLayout& where_y, const NormParameters& parameters, double eps, void* workspace,
                    int threads) {
    if (!known(dtype)) return kBadDtype;
    if (!valid(where_x, parameters) || !same_kind(where_x, where_y)) return kBadArgument;
    const Input from{x, where_x};
    const Output to{y, where_y};
    if (channels_last(where_x)) {
        forward_channels_last(dtype, from, to, {mean, rstd}, parameters, eps, static_cast<float*>(workspace),
                              threads);
    } else {
        forward_contiguous(dtype, from, to, {mean, rstd}, parameters, eps, threads);
    }
    return kOk;
}

int group_norm_silu_backward(const void* dy, const void* x, void* dx, const void* residual, const float* mean,
                             const float* rstd, int dtype, const NormLayout& where_dy,
                             const NormLayout& where_x, const NormLayout& where_dx,
                             const NormLayout& where_residual, const NormParameters& parameters,
                             void* workspace, int threads) {
    if (!known(dtype)) return kBadDtype;
    if (!valid(where_x, parameters) || !same_kind(where_x, where_dy) || !same_kind(where_x, where_dx) ||
        (residual && !same_kind(where_x, where_residual))) {
        return kBadArgument;
    }
    // The backward pass only reads the statistics.
    const Statistics statistics{const_cast<float*>(mean), const_cast<float*>(rstd)};
    const Input cotangent{dy, where_dy}, from{x, where_x}, added{residual, where_residual};
    const Output to{dx, where_dx};
    if (channels_last(where_x)) {
        backward_channels_last(dtype, cotangent, from, to, added, statistics, parameters,
                               static_cast<float*>(workspace), threads);
    } else {
        backward_contiguous(dtype, cotangent, from, to, added, statistics, parameters, threads);
    }
    return kOk;
}

}  // namespace sda::cpu
