#include "group_norm_silu.h"

#include <algorithm>
#include <cmath>

#include "group_norm_silu_tiles.h"
#include "parallel.h"
#include "rows.h"

namespace sda::cpu {
namespace {

constexpr int64_t kFolded = 128;             // lanes whose moments are folded in halves: a power of two
constexpr int64_t kSummed = 64;              // lanes of a channel whose sums are folded
constexpr int64_t kSpan = int64_t{1} << 18;  // elements of a channels_last image that are summed together
constexpr int64_t kGrain = 65536;            // elements worth a thread
constexpr int kNumbers = 3, kLetters = 5;    // of a channel at most, for every span and for the whole image

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

bool channels_last(const NormLayout& where) { return where.stride_spatial != 1; }

bool same_kind(const NormLayout& a, const NormLayout& b) {
    return a.images == b.images && a.channels == b.channels && a.spatial == b.spatial &&
           channels_last(a) == channels_last(b);
}

bool valid(const NormLayout& where, const NormParameters& p) {
    return where.images >= 0 && where.channels > 0 && where.spatial > 0 && p.groups > 0 &&
           where.channels % p.groups == 0;
}

int64_t items_per_thread(int64_t elements) { return std::max<int64_t>(1, kGrain / elements); }

Source read(const Input& in, int dtype, int64_t n, int64_t element, int64_t pitch) {
    const int64_t offset = n * in.where.stride_image + element;
    return {static_cast<const char*>(in.data) + offset * bytes(dtype), pitch};
}

Target write(const Output& out, int dtype, int64_t n, int64_t element, int64_t pitch) {
    const int64_t offset = n * out.where.stride_image + element;
    return {static_cast<char*>(out.data) + offset * bytes(dtype), pitch};
}

// A and B of channel c in image n.
void affine(const NormParameters& p, int64_t n, int64_t c, float rstd, float* slope, float* offset) {
    const float scale = p.scale ? 1.0f + p.scale[n * p.stride_scale + c] : 1.0f;
    *slope = rstd * p.weight[c] * scale;
    *offset = p.bias[c] * scale + (p.shift ? p.shift[n * p.stride_shift + c] : 0.0f);
}

float reciprocal_deviation(double variance, double eps) {
    return static_cast<float>(1.0 / std::sqrt(variance + eps));
}

// ---- Contiguous images: one group at a time, which the second cache holds.

// Cuts `count` elements that lie side by side into tiles: calls body(first element, tile, rows before it).
template <class Body>
void for_tiles(int64_t count, int64_t lanes, const Body& body) {
    const int64_t rows = count / lanes;
    for (int64_t r = 0; r < rows; r += kRows) body(r * lanes, Tile{std::min(kRows, rows - r), lanes}, r);
    if (rows * lanes < count) body(rows * lanes, Tile{1, count - rows * lanes}, rows);
}

struct Moments {
    double count = 0.0, mean = 0.0, squares = 0.0;
};

void merge(Moments* a, double count, double mean, double squares) {
    const double total = a->count + count, delta = mean - a->mean;
    a->mean += delta * (count / total);
    a->squares += squares + delta * delta * (a->count * count / total);
    a->count = total;
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

void forward_contiguous(int dtype, const Input& x, const Output& y, const Statistics& s,
                        const NormParameters& p, double eps, int threads) {
    const int64_t spatial = x.where.spatial, size = x.where.channels / p.groups;
    const int64_t width = std::min(kLanes, spatial);
    const auto body = [&](int64_t begin, int64_t end) {
        Lanes lanes;
        for (int64_t item = begin; item < end; ++item) {
            const int64_t n = item / p.groups, first = item % p.groups * size;
            const Moments all = moments_of(dtype, x, n, first * spatial, size * spatial);
            const float mean = static_cast<float>(all.mean);
            const float rstd = reciprocal_deviation(all.squares / all.count, eps);
            s.mean[item] = mean;
            s.rstd[item] = rstd;
            fill(lanes.mean, width, mean);
            for (int64_t c = first; c < first + size; ++c) {
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

// Sums the values into the first, halving them again and again.
float fold(float* values, int64_t count) {
    while (count > 1) {
        const int64_t half = count / 2, kept = count - half;
        for (int64_t i = 0; i < half; ++i) values[i] += values[kept + i];
        count = kept;
    }
    return values[0];
}

void backward_contiguous(int dtype, const Input& dy, const Input& x, const Output& dx, const Statistics& s,
                         const NormParameters& p, int threads) {
    const int64_t spatial = x.where.spatial, size = x.where.channels / p.groups;
    const int64_t width = std::min(kLanes, spatial), summed = std::min(kSummed, spatial);
    const auto body = [&](int64_t begin, int64_t end) {
        Lanes lanes;
        for (int64_t item = begin; item < end; ++item) {
            const int64_t n = item / p.groups, first = item % p.groups * size;
            const float rstd = s.rstd[item];
            fill(lanes.mean, width, s.mean[item]);
            const auto set_channel = [&](int64_t c) {
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
                             tile, lanes.view(), sums, moments);
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
                                   write(dx, dtype, n, at, width), tile, lanes.view());
                });
            }
        }
    };
    parallel_for(x.where.images * p.groups, items_per_thread(size * spatial), threads, body);
}

// ---- channels_last: spans of pixels, two numbers per span and channel, coefficients per channel.

// A few numbers of every channel for each span of each image, zero at first.
class Partials {
  public:
    static int64_t spans_of(const NormLayout& where) {
        const int64_t pixels = std::max<int64_t>(1, kSpan / where.channels);
        return (where.spatial + pixels - 1) / pixels;
    }
    static int64_t size_of(const NormLayout& where, int numbers) {
        return where.images * spans_of(where) * where.channels * numbers;
    }

    Partials(const NormLayout& where, int numbers, float* memory)
        : channels(where.channels),
          pixels(std::max<int64_t>(1, kSpan / where.channels)),
          spans(spans_of(where)),
          spatial(where.spatial),
          size_(where.images * spans * channels),
          values_(memory) {
        std::fill(values_, values_ + size_ * numbers, 0.0f);
    }

    float* number(int which, int64_t n, int64_t span) const {
        return values_ + which * size_ + (n * spans + span) * channels;
    }
    int64_t count(int64_t span) const { return std::min(pixels, spatial - span * pixels); }

    const int64_t channels, pixels, spans, spatial;

  private:
    int64_t size_;
    float* values_;
};

// Coefficients of every channel of every image, in memory for kLetters of them.
class ChannelCoefficients {
  public:
    ChannelCoefficients(const NormLayout& where, float* memory)
        : channels_(where.channels), size_(where.images * where.channels), values_(memory) {}

    float* letter(int which, int64_t n, int64_t c) const {
        return values_ + which * size_ + n * channels_ + c;
    }
    Coefficients forward(int64_t n, int64_t c) const {
        return {letter(0, n, c), letter(1, n, c), letter(2, n, c)};
    }
    Coefficients backward(int64_t n, int64_t c) const {
        return {letter(0, n, c), letter(1, n, c), letter(2, n, c), letter(3, n, c), letter(4, n, c)};
    }

  private:
    int64_t channels_, size_;
    float* values_;
};

// Calls body(first pixel, first channel, tile, rows before it) on the tiles of a span.
template <class Body>
void for_tiles(const Partials& partials, int64_t span, const Body& body) {
    const int64_t pixels = partials.count(span);
    for (int64_t r = 0; r < pixels; r += kRows) {
        for (int64_t c = 0; c < partials.channels; c += kLanes) {
            const Tile tile{std::min(kRows, pixels - r), std::min(kLanes, partials.channels - c)};
            body(span * partials.pixels + r, c, tile, r);
        }
    }
}

// first(n, span), then middle(n), then last(n, span): image by image where there are enough images for the
// threads, which keeps an image in the cache, else stage by stage.
template <class First, class Middle, class Last>
void in_stages(const NormLayout& where, int64_t spans, int threads, const First& first, const Middle& middle,
               const Last& last) {
    const int64_t elements = where.channels * where.spatial;
    if (where.images >= threads) {
        parallel_for(where.images, items_per_thread(elements), threads, [&](int64_t begin, int64_t end) {
            for (int64_t n = begin; n < end; ++n) {
                for (int64_t span = 0; span < spans; ++span) first(n, span);
                middle(n);
                for (int64_t span = 0; span < spans; ++span) last(n, span);
            }
        });
        return;
    }
    const auto in_spans = [&](const auto& stage) {
        parallel_for(where.images * spans, items_per_thread(elements / spans), threads,
                     [&](int64_t begin, int64_t end) {
                         for (int64_t item = begin; item < end; ++item) stage(item / spans, item % spans);
                     });
    };
    in_spans(first);
    for (int64_t n = 0; n < where.images; ++n) middle(n);
    in_spans(last);
}

void forward_channels_last(int dtype, const Input& x, const Output& y, const Statistics& s,
                           const NormParameters& p, double eps, float* workspace, int threads) {
    const int64_t size = x.where.channels / p.groups, pitch_x = x.where.stride_spatial;
    const int64_t pitch_y = y.where.stride_spatial;
    const Partials partials(x.where, 3, workspace);
    const ChannelCoefficients coefficients(x.where, workspace + Partials::size_of(x.where, 3));
    const auto moments = [&](int64_t n, int64_t span) {
        float* base = partials.number(0, n, span);
        float* offset = partials.number(1, n, span);
        float* squares = partials.number(2, n, span);
        for_tiles(partials, span, [&](int64_t pixel, int64_t c, const Tile& tile, int64_t done) {
            merge_moments(dtype, read(x, dtype, n, pixel * pitch_x + c, pitch_x), tile, done,
                          {base + c, offset + c, squares + c});
        });
    };
    const auto finish = [&](int64_t n) {
        for (int64_t g = 0; g < p.groups; ++g) {
            Moments all;
            for (int64_t span = 0; span < partials.spans; ++span) {
                const float* base = partials.number(0, n, span) + g * size;
                const float* offset = partials.number(1, n, span) + g * size;
                const float* squares = partials.number(2, n, span) + g * size;
                const double count = static_cast<double>(partials.count(span));
                double middle = 0.0, spread = 0.0;
                for (int64_t i = 0; i < size; ++i) middle += static_cast<double>(base[i]) + offset[i];
                middle /= static_cast<double>(size);
                for (int64_t i = 0; i < size; ++i) {
                    const double delta = static_cast<double>(base[i]) + offset[i] - middle;
                    spread += squares[i] + count * delta * delta;
                }
                merge(&all, count * static_cast<double>(size), middle, spread);
            }
            const int64_t item = n * p.groups + g;
            s.mean[item] = static_cast<float>(all.mean);
            s.rstd[item] = reciprocal_deviation(all.squares / all.count, eps);
            for (int64_t c = g * size; c < (g + 1) * size; ++c) {
                *coefficients.letter(0, n, c) = s.mean[item];
                affine(p, n, c, s.rstd[item], coefficients.letter(1, n, c), coefficients.letter(2, n, c));
            }
        }
    };
    const auto apply = [&](int64_t n, int64_t span) {
        for_tiles(partials, span, [&](int64_t pixel, int64_t c, const Tile& tile, int64_t) {
            apply_norm(dtype, p.silu, read(x, dtype, n, pixel * pitch_x + c, pitch_x),
                       write(y, dtype, n, pixel * pitch_y + c, pitch_y), tile, coefficients.forward(n, c));
        });
    };
    in_stages(x.where, partials.spans, threads, moments, finish, apply);
}

void backward_channels_last(int dtype, const Input& dy, const Input& x, const Output& dx, const Statistics& s,
                            const NormParameters& p, float* workspace, int threads) {
    const int64_t size = x.where.channels / p.groups, pitch_x = x.where.stride_spatial;
    const int64_t pitch_dy = dy.where.stride_spatial, pitch_dx = dx.where.stride_spatial;
    const Partials partials(x.where, 2, workspace);
    const ChannelCoefficients coefficients(x.where, workspace + Partials::size_of(x.where, 2));
    for (int64_t n = 0; n < x.where.images; ++n) {
        for (int64_t c = 0; c < x.where.channels; ++c) {
            const int64_t item = n * p.groups + c / size;
            *coefficients.letter(0, n, c) = s.mean[item];
            affine(p, n, c, s.rstd[item], coefficients.letter(1, n, c), coefficients.letter(2, n, c));
        }
    }
    const auto sums = [&](int64_t n, int64_t span) {
        for_tiles(partials, span, [&](int64_t pixel, int64_t c, const Tile& tile, int64_t) {
            add_sums(dtype, p.silu, read(dy, dtype, n, pixel * pitch_dy + c, pitch_dy),
                     read(x, dtype, n, pixel * pitch_x + c, pitch_x), tile, coefficients.backward(n, c),
                     partials.number(0, n, span) + c, partials.number(1, n, span) + c);
        });
    };
    const auto finish = [&](int64_t n) {
        for (int64_t g = 0; g < p.groups; ++g) {
            double total = 0.0, moment = 0.0;
            for (int64_t span = 0; span < partials.spans; ++span) {
                for (int64_t c = g * size; c < (g + 1) * size; ++c) {
                    const double slope = *coefficients.letter(1, n, c);
                    total += slope * partials.number(0, n, span)[c];
                    moment += slope * partials.number(1, n, span)[c];
                }
            }
            const double count = static_cast<double>(size * x.where.spatial);
            const double rstd = s.rstd[n * p.groups + g];
            for (int64_t c = g * size; c < (g + 1) * size; ++c) {
                *coefficients.letter(3, n, c) = static_cast<float>(-rstd * rstd * moment / count);
                *coefficients.letter(4, n, c) = static_cast<float>(-total / count);
            }
        }
    };
    const auto apply = [&](int64_t n, int64_t span) {
        for_tiles(partials, span, [&](int64_t pixel, int64_t c, const Tile& tile, int64_t) {
            apply_gradient(dtype, p.silu, read(dy, dtype, n, pixel * pitch_dy + c, pitch_dy),
                           read(x, dtype, n, pixel * pitch_x + c, pitch_x),
                           write(dx, dtype, n, pixel * pitch_dx + c, pitch_dx), tile,
                           coefficients.backward(n, c));
        });
    };
    in_stages(x.where, partials.spans, threads, sums, finish, apply);
}

}  // namespace

int64_t group_norm_silu_workspace(const NormLayout& where) {
    if (!channels_last(where) || where.images <= 0 || where.channels <= 0 || where.spatial <= 0) return 0;
    const int64_t floats = Partials::size_of(where, kNumbers) + where.images * where.channels * kLetters;
    return floats * static_cast<int64_t>(sizeof(float));
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

int group_norm_silu_backward(const void* dy, const void* x, void* dx, const float* mean, const float* rstd,
                             int dtype, const NormLayout& where_dy, const NormLayout& where_x,
                             const NormLayout& where_dx, const NormParameters& parameters, void* workspace,
                             int threads) {
    if (!known(dtype)) return kBadDtype;
    if (!valid(where_x, parameters) || !same_kind(where_x, where_dy) || !same_kind(where_x, where_dx)) {
        return kBadArgument;
    }
    // The backward pass only reads the statistics.
    const Statistics statistics{const_cast<float*>(mean), const_cast<float*>(rstd)};
    const Input cotangent{dy, where_dy}, from{x, where_x};
    const Output to{dx, where_dx};
    if (channels_last(where_x)) {
        backward_channels_last(dtype, cotangent, from, to, statistics, parameters,
                               static_cast<float*>(workspace), threads);
    } else {
        backward_contiguous(dtype, cotangent, from, to, statistics, parameters, threads);
    }
    return kOk;
}

}  // namespace sda::cpu
