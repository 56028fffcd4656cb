#include <algorithm>

#include "group_norm_silu_layouts.h"
#include "parallel.h"

namespace sda::cpu {
namespace {

constexpr int64_t kFolded = 128;  // lanes whose moments are folded in halves: a power of two
constexpr int64_t kSummed = 64;   // lanes of a channel whose sums are folded

// Cuts `count` elements that lie side by side into tiles: calls body(first element, tile, rows before it).
template <class Body>
void for_tiles(int64_t count, int64_t lanes, const Body& body) {
    const int64_t rows = count / lanes;
    for (int64_t r = 0; r < rows; r += kRows) body(r * lanes, Tile{std::min(kRows, rows - r), lanes}, r);
    if (rows * lanes < count) body(rows * lanes, Tile{1, count - rows * lanes}, rows);
}

// The moments of `count` elements side by side.
Moments moments_of(int dtype, const Input& x, int64_t n, int64_t first, int64_t count) {
    int64_t lanes = kFolded;
    while (lanes > count) lanes /= 2;
    float base[kFolded], offset[kFolded], squares[kFolded];
    float rest[kFolded], ignored[2][kFolded];
    int64_t remaining = 0;
    for_tiles(count, lanes, [&](int64_t element, const Tile& tile, int64_t done) {
        const Source source = read(x, dtype, n, first + element, lanes);
        if (tile.lanes == lanes) {
            merge_moments(dtype, source, tile, done, {base, offset, squares});
        } else {
            remaining = tile.lanes;
            merge_moments(dtype, source, tile, 0, {rest, ignored[0], ignored[1]});
        }
    });
    float rows = static_cast<float>(count / lanes);
    for (int64_t half = lanes / 2; half > 0; half /= 2, rows *= 2.0f) {
        for (int64_t i = 0; i < half; ++i) {
            const float delta = (base[half + i] - base[i]) + (offset[half + i] - offset[i]);
            offset[i] += 0.5f * delta;
            squares[i] += squares[half + i] + 0.5f * rows * (delta * delta);
        }
    }
    Moments all{static_cast<double>(count - remaining), static_cast<double>(base[0]) + offset[0], squares[0]};
    for (int64_t i = 0; i < remaining; ++i) merge(&all, 1.0, rest[i], 0.0);
    return all;
}

// The same coefficients for all elements of a channel.
struct Lanes {
    float mean[kLanes], slope[kLanes], offset[kLanes], pull[kLanes], drift[kLanes];

    Coefficients view() const { return {mean, slope, offset, pull, drift}; }
};

void fill(float (&lanes)[kLanes], int64_t count, float value) { std::fill(lanes, lanes + count, value); }

// Sums the values into the first, halving them again and again.
float fold(float* values, int64_t count) {
    while (count > 1) {
        const int64_t half = count / 2, kept = count - half;
        for (int64_t i = 0; i < half; ++i) values[i] += values[kept + i];
        count = kept;
    }
    return values[0];
}

}  // namespace

void forward_contiguous(int dtype, const Input& x, const Output& y, const Statistics& s,
                        const NormParameters& p, double eps, int threads) {
    const int64_t spatial = x.where.spatial, size = x.where.channels / p.groups;
    const int64_t width = std::min(kLanes, spatial);
    const auto body = [&](int64_t begin, int64_t end) {
        Lanes lanes;
        for (int64_t item = begin; item < end; ++item) {
            const int64_t n = item / p.groups, first = item % p.groups * size;
            Moments all;
            if (p.x_bias) {
                for (int64_t c = first; c < first + size; ++c) {
                    const Moments one = moments_of(dtype, x, n, c * spatial, spatial);
                    merge(&all, one.count, one.mean + raise(p, c), one.squares);
                }
            } else {
                all = moments_of(dtype, x, n, first * spatial, size * spatial);
            }
            const float mean = static_cast<float>(all.mean);
            const float rstd = reciprocal_deviation(all.squares / all.count, eps);
            s.mean[item] = mean;
            s.rstd[item] = rstd;
            for (int64_t c = first; c < first + size; ++c) {
                fill(lanes.mean, width, mean - raise(p, c));
                float slope, offset;
                affine(p, n, c, rstd, &slope, &offset);
                fill(lanes.slope, width, slope);
                fill(lanes.offset, width, offset);
                for_tiles(spatial, width, [&](int64_t element, const Tile& tile, int64_t) {
                    const int64_t at = c * spatial + element;
                    apply_norm(dtype, p.silu, read(x, dtype, n, at, width), write(y, dtype, n, at, width),
                               tile, lanes.view());
                });
            }
        }
    };
    parallel_for(x.where.images * p.groups, items_per_thread(size * spatial), threads, body);
}

void backward_contiguous(int dtype, const Input& dy, const Input& x, const Output& dx, const Input& residual,
                         const Statistics& s, const NormParameters& p, int threads) {
    const int64_t spatial = x.where.spatial, size = x.where.channels / p.groups;
    const int64_t width = std::min(kLanes, spatial), summed = std::min(kSummed, spatial);
    const auto body = [&](int64_t begin, int64_t end) {
        Lanes lanes;
        for (int64_t item = begin; item < end; ++item) {
            const int64_t n = item / p.groups, first = item % p.groups * size;
            const float rstd = s.rstd[item];
            const auto set_channel = [&](int64_t c) {
                fill(lanes.mean, width, s.mean[item] - raise(p, c));
                float slope, offset;
                affine(p, n, c, rstd, &slope, &offset);
                fill(lanes.slope, width, slope);
                fill(lanes.offset, width, offset);
                return slope;
            };
            double total = 0.0, moment = 0.0;
            for (int64_t c = first; c < first + size; ++c) {
                const double slope = set_channel(c);
                float sums[kSummed] = {}, moments[kSummed] = {};
                for_tiles(spatial, summed, [&](int64_t element, const Tile& tile, int64_t) {
                    const int64_t at = c * spatial + element;
                    add_sums(dtype, p.silu, read(dy, dtype, n, at, summed), read(x, dtype, n, at, summed),
                             tile, lanes.view(), sums, moments, nullptr);
                });
                total += slope * fold(sums, summed);
                moment += slope * fold(moments, summed);
            }
            const double count = static_cast<double>(size * spatial);
            fill(lanes.pull, width, static_cast<float>(-static_cast<double>(rstd) * rstd * moment / count));
            fill(lanes.drift, width, static_cast<float>(-total / count));
            for (int64_t c = first; c < first + size; ++c) {
                set_channel(c);
                for_tiles(spatial, width, [&](int64_t element, const Tile& tile, int64_t) {
                    const int64_t at = c * spatial + element;
                    apply_gradient(dtype, p.silu, read(dy, dtype, n, at, width), read(x, dtype, n, at, width),
                                   nullptr, read(residual, dtype, n, at, width),
                                   write(dx, dtype, n, at, width), tile, lanes.view());
                });
            }
        }
    };
    parallel_for(x.where.images * p.groups, items_per_thread(size * spatial), threads, body);
}

}  // namespace sda::cpu
