// What the versions of group_norm_silu for contiguous and for channels_last images share on the CPU, and
// those versions. Their letters are those of group_norm_silu.h.
#pragma once

#include <algorithm>
#include <cmath>

#include "group_norm_silu.h"
#include "group_norm_silu_tiles.h"
#include "rows.h"

namespace sda::cpu {

constexpr int64_t kGrain = 65536;  // elements worth a thread

struct Input {
    const void* data;
    const NormLayout& where;
};

struct Output {
    void* data;
    const NormLayout& where;
};

struct Statistics {
    float* mean;
    float* rstd;
};

inline bool channels_last(const NormLayout& where) { return where.stride_spatial != 1; }

inline int64_t items_per_thread(int64_t elements) { return std::max<int64_t>(1, kGrain / elements); }

// Rows without data where `in` has none.
inline Source read(const Input& in, int dtype, int64_t n, int64_t element, int64_t pitch) {
    if (!in.data) return {nullptr, pitch};
    const int64_t offset = n * in.where.stride_image + element;
    return {static_cast<const char*>(in.data) + offset * bytes(dtype), pitch};
}

inline Target write(const Output& out, int dtype, int64_t n, int64_t element, int64_t pitch) {
    const int64_t offset = n * out.where.stride_image + element;
    return {static_cast<char*>(out.data) + offset * bytes(dtype), pitch};
}

inline float raise(const NormParameters& p, int64_t c) { return p.x_bias ? p.x_bias[c] : 0.0f; }

// A and B of channel c in image n.
inline void affine(const NormParameters& p, int64_t n, int64_t c, float rstd, float* slope, float* offset) {
    const float scale = p.scale ? 1.0f + p.scale[n * p.stride_scale + c] : 1.0f;
    *slope = rstd * p.weight[c] * scale;
    *offset = p.bias[c] * scale + (p.shift ? p.shift[n * p.stride_shift + c] : 0.0f);
}

inline float reciprocal_deviation(double variance, double eps) {
    return static_cast<float>(1.0 / std::sqrt(variance + eps));
}

struct Moments {
    double count = 0.0, mean = 0.0, squares = 0.0;
};

inline void merge(Moments* a, double count, double mean, double squares) {
    const double total = a->count + count, delta = mean - a->mean;
    a->mean += delta * (count / total);
    a->squares += squares + delta * delta * (a->count * count / total);
    a->count = total;
}

// Contiguous images: one group at a time, which the second cache holds.
void forward_contiguous(int dtype, const Input& x, const Output& y, const Statistics& s,
                        const NormParameters& p, double eps, int threads);
void backward_contiguous(int dtype, const Input& dy, const Input& x, const Output& dx, const Input& residual,
                         const Statistics& s, const NormParameters& p, int threads);

// channels_last images: rows of one or several pixels, spans of rows, two or three numbers per span and lane,
// coefficients per lane and du of a small image for every thread, all of which lie in the workspace.
int64_t channels_last_floats(const NormLayout& where, int threads);
void forward_channels_last(int dtype, const Input& x, const Output& y, const Statistics& s,
                           const NormParameters& p, double eps, float* workspace, int threads);
void backward_channels_last(int dtype, const Input& dy, const Input& x, const Output& dx,
                            const Input& residual, const Statistics& s, const NormParameters& p,
                            float* workspace, int threads);

}  // namespace sda::cpu
