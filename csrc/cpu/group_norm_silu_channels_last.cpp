#include <algorithm>

#include "group_norm_silu_layouts.h"
#include "parallel.h"

namespace sda::cpu {
namespace {

constexpr int64_t kSpan = int64_t{1} << 18;  // elements of an image that are summed together
constexpr int kNumbers = 3, kLetters = 5;    // of a channel at most, for every span and for the whole image

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

}  // namespace

int64_t channels_last_floats(const NormLayout& where) {
    return Partials::size_of(where, kNumbers) + where.images * where.channels * kLetters;
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

}  // namespace sda::cpu
