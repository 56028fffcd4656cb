#include "group_norm_silu_tiles.h"

#include <algorithm>

#include "../narrow.h"
#include "../status.h"
#include "clones.h"
#include "sigmoid.h"

namespace sda::cpu {
namespace {

// Two passes, so that neither a large mean nor an outlier costs precision.
template <class T>
SDA_INLINE void merge_moments_of(const Source& source, const Tile& tile, int64_t done,
                                 const LaneMoments& moments) {
    const T* x = static_cast<const T*>(source.data);
    float *base = moments.base, *offset = moments.offset, *squares = moments.squares;
    if (done == 0) {
        for (int64_t i = 0; i < tile.lanes; ++i) {
            base[i] = widen(x[i]);
            offset[i] = 0.0f;
            squares[i] = 0.0f;
        }
    }
    float center[kLanes], sum[kLanes];
    std::fill(sum, sum + tile.lanes, 0.0f);
    for (int64_t r = 0; r < tile.rows; ++r) {
        const T* row = x + r * source.pitch;
#pragma GCC ivdep
        for (int64_t i = 0; i < tile.lanes; ++i) sum[i] += widen(row[i]) - base[i];
    }
    const float rows = static_cast<float>(tile.rows);
    for (int64_t i = 0; i < tile.lanes; ++i) {
        center[i] = sum[i] / rows;
        sum[i] = 0.0f;
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
        const T* row = x + r * source.pitch;
#pragma GCC ivdep
        for (int64_t i = 0; i < tile.lanes; ++i) {
            const float d = widen(row[i]) - base[i] - center[i];
            sum[i] += d * d;
        }
    }
    const float share = rows / static_cast<float>(done + tile.rows);
    const float weight = static_cast<float>(done) * share;
#pragma GCC ivdep
    for (int64_t i = 0; i < tile.lanes; ++i) {
        const float delta = center[i] - offset[i];
        offset[i] += delta * share;
        squares[i] += sum[i] + delta * delta * weight;
    }
}

// Three short loops and not one: each one's instructions of many lanes fit the processor's queues together.
template <class T, bool kSilu>
SDA_INLINE void apply_norm_to(const Source& source, const Target& target, const Tile& tile,
                              const Coefficients& c) {
    const float *mean = c.mean, *slope = c.slope, *offset = c.offset;
    float u[kLanes];
    for (int64_t r = 0; r < tile.rows; ++r) {
        const T* x = static_cast<const T*>(source.data) + r * source.pitch;
        T* y = static_cast<T*>(target.data) + r * target.pitch;
#pragma GCC ivdep
        for (int64_t i = 0; i < tile.lanes; ++i) {
            u[i] = __builtin_fmaf(widen(x[i]) - mean[i], slope[i], offset[i]);
        }
        if (kSilu) {
            for (int64_t i = 0; i < tile.lanes; ++i) u[i] *= sigmoid(u[i]);
        }
#pragma GCC ivdep
        for (int64_t i = 0; i < tile.lanes; ++i) y[i] = narrow<T>(u[i]);
    }
}

// du of one row: dy times the derivative of SiLU at u.
template <class T, bool kSilu>
SDA_INLINE void differentiate(const T* dy, const T* x, int64_t lanes, const Coefficients& c, float* du) {
    const float *mean = c.mean, *slope = c.slope, *offset = c.offset;
#pragma GCC ivdep
    for (int64_t i = 0; i < lanes; ++i) {
        if (kSilu) {
            const float u = __builtin_fmaf(widen(x[i]) - mean[i], slope[i], offset[i]), s = sigmoid(u);
            du[i] = widen(dy[i]) * (s * __builtin_fmaf(u, 1.0f - s, 1.0f));
        } else {
            du[i] = widen(dy[i]);
        }
    }
}

template <class T, bool kSilu>
SDA_INLINE void add_sums_of(const Source& cotangent, const Source& source, const Tile& tile,
                            const Coefficients& c, float* sum, float* moment, float* kept) {
    const float* mean = c.mean;
    float tile_sum[kLanes], tile_moment[kLanes], row[kLanes];
    std::fill(tile_sum, tile_sum + tile.lanes, 0.0f);
    std::fill(tile_moment, tile_moment + tile.lanes, 0.0f);
    for (int64_t r = 0; r < tile.rows; ++r) {
        const T* x = static_cast<const T*>(source.data) + r * source.pitch;
        const T* dy = static_cast<const T*>(cotangent.data) + r * cotangent.pitch;
        float* du = kept ? kept + r * tile.lanes : row;
        differentiate<T, kSilu>(dy, x, tile.lanes, c, du);
#pragma GCC ivdep
        for (int64_t i = 0; i < tile.lanes; ++i) {
            tile_sum[i] += du[i];
            tile_moment[i] = __builtin_fmaf(du[i], widen(x[i]) - mean[i], tile_moment[i]);
        }
    }
#pragma GCC ivdep
    for (int64_t i = 0; i < tile.lanes; ++i) {
        sum[i] += tile_sum[i];
        moment[i] += tile_moment[i];
    }
}

template <class T, bool kSilu>
SDA_INLINE void apply_gradient_to(const Source& cotangent, const Source& source, const float* kept,
                                  const Source& residual, const Target& target, const Tile& tile,
                                  const Coefficients& c) {
    const float *mean = c.mean, *slope = c.slope, *pull = c.pull, *drift = c.drift;
    float row[kLanes];
    for (int64_t r = 0; r < tile.rows; ++r) {
        const T* x = static_cast<const T*>(source.data) + r * source.pitch;
        const T* dy = static_cast<const T*>(cotangent.data) + r * cotangent.pitch;
        T* dx = static_cast<T*>(target.data) + r * target.pitch;
        if (!kept) differentiate<T, kSilu>(dy, x, tile.lanes, c, row);
        const float* du = kept ? kept + r * tile.lanes : row;
        const T* added = residual.data ? static_cast<const T*>(residual.data) + r * residual.pitch : nullptr;
#pragma GCC ivdep
        for (int64_t i = 0; i < tile.lanes; ++i) {
            const float rest = __builtin_fmaf(pull[i], widen(x[i]) - mean[i], drift[i]);
            const float value = __builtin_fmaf(slope[i], du[i], rest);
            dx[i] = narrow<T>(added ? value + widen(added[i]) : value);
        }
    }
}

}  // namespace

SDA_CLONES void merge_moments(int dtype, const Source& x, const Tile& tile, int64_t done,
                              const LaneMoments& moments) {
    if (dtype == kFloat32) merge_moments_of<float>(x, tile, done, moments);
    if (dtype == kBfloat16) merge_moments_of<Bfloat16>(x, tile, done, moments);
    if (dtype == kFloat16) merge_moments_of<Float16>(x, tile, done, moments);
}

SDA_CLONES void apply_norm(int dtype, bool silu, const Source& x, const Target& y, const Tile& tile,
                           const Coefficients& c) {
    if (dtype == kFloat32 && silu) apply_norm_to<float, true>(x, y, tile, c);
    if (dtype == kFloat32 && !silu) apply_norm_to<float, false>(x, y, tile, c);
    if (dtype == kBfloat16 && silu) apply_norm_to<Bfloat16, true>(x, y, tile, c);
    if (dtype == kBfloat16 && !silu) apply_norm_to<Bfloat16, false>(x, y, tile, c);
    if (dtype == kFloat16 && silu) apply_norm_to<Float16, true>(x, y, tile, c);
    if (dtype == kFloat16 && !silu) apply_norm_to<Float16, false>(x, y, tile, c);
}

SDA_CLONES void add_sums(int dtype, bool silu, const Source& dy, const Source& x, const Tile& tile,
                         const Coefficients& c, float* sum, float* moment, float* du) {
    if (dtype == kFloat32 && silu) add_sums_of<float, true>(dy, x, tile, c, sum, moment, du);
    if (dtype == kFloat32 && !silu) add_sums_of<float, false>(dy, x, tile, c, sum, moment, du);
    if (dtype == kBfloat16 && silu) add_sums_of<Bfloat16, true>(dy, x, tile, c, sum, moment, du);
    if (dtype == kBfloat16 && !silu) add_sums_of<Bfloat16, false>(dy, x, tile, c, sum, moment, du);
    if (dtype == kFloat16 && silu) add_sums_of<Float16, true>(dy, x, tile, c, sum, moment, du);
    if (dtype == kFloat16 && !silu) add_sums_of<Float16, false>(dy, x, tile, c, sum, moment, du);
}

SDA_CLONES void apply_gradient(int dtype, bool silu, const Source& dy, const Source& x, const float* du,
                               const Source& residual, const Target& dx, const Tile& tile,
                               const Coefficients& c) {
    if (dtype == kFloat32 && silu) apply_gradient_to<float, true>(dy, x, du, residual, dx, tile, c);
    if (dtype == kFloat32 && !silu) apply_gradient_to<float, false>(dy, x, du, residual, dx, tile, c);
    if (dtype == kBfloat16 && silu) apply_gradient_to<Bfloat16, true>(dy, x, du, residual, dx, tile, c);
    if (dtype == kBfloat16 && !silu) apply_gradient_to<Bfloat16, false>(dy, x, du, residual, dx, tile, c);
    if (dtype == kFloat16 && silu) apply_gradient_to<Float16, true>(dy, x, du, residual, dx, tile, c);
    if (dtype == kFloat16 && !silu) apply_gradient_to<Float16, false>(dy, x, du, residual, dx, tile, c);
}

}  // namespace sda::cpu
