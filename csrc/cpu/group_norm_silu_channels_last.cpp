#include <algorithm>
#include <atomic>

#include "group_norm_silu_layouts.h"
#include "parallel.h"

namespace sda::cpu {
namespace {

constexpr int64_t kSpan = int64_t{1} << 18;  // elements of an image that are summed together
constexpr int64_t kKept =
    int64_t{1} << 16;  // elements of an image at most whose du is kept: the second cache
constexpr int64_t kFewestRows = 32;
constexpr int kNumbers = 3, kLetters = 5;  // of a lane at most, for every span and for the whole image

bool dense(const NormLayout& where) { return where.stride_spatial == where.channels; }

// Pixels side by side that make one row of lanes, so that loops over few channels are long.
int64_t pixels_per_row(const NormLayout& where, bool dense) {
    int64_t pixels = 1;
    if (!dense) return pixels;
    while (2 * pixels * where.channels <= kLanes && where.spatial % (2 * pixels) == 0 &&
           where.spatial / (2 * pixels) >= kFewestRows) {
        pixels *= 2;
    }
    return pixels;
}

// The layout with rows for pixels and lanes for channels.
NormLayout in_rows(const NormLayout& where, int64_t pixels) {
    return {where.images,       where.channels * pixels, where.spatial / pixels,
            where.stride_image, where.stride_channel,    where.stride_spatial * pixels};
}

// A few numbers of every lane for each span of each image.
class Partials {
  public:
    static int64_t spans_of(const NormLayout& rows) {
        const int64_t count = std::max<int64_t>(1, kSpan / rows.channels);
        return (rows.spatial + count - 1) / count;
    }
    static int64_t size_of(const NormLayout& rows, int numbers) {
        return rows.images * spans_of(rows) * rows.channels * numbers;
    }

    Partials(const NormLayout& rows, int numbers, float* memory)
        : lanes(rows.channels),
          rows(std::max<int64_t>(1, kSpan / rows.channels)),
          spans(spans_of(rows)),
          all_rows_(rows.spatial),
          numbers_(numbers),
          values_(memory) {}

    void clear(int64_t n) const {
        std::fill(number(0, n, 0), number(0, n, 0) + spans * lanes * numbers_, 0.0f);
    }
    float* number(int which, int64_t n, int64_t span) const {
        return values_ + ((n * spans + span) * numbers_ + which) * lanes;
    }
    int64_t count(int64_t span) const { return std::min(rows, all_rows_ - span * rows); }

    const int64_t lanes, rows, spans;

  private:
    int64_t all_rows_;
    int numbers_;
    float* values_;
};

// Coefficients of every lane of every image, in memory for kLetters of them. Channel c has the lanes
// c, c + channels, and so on.
class LaneCoefficients {
  public:
    LaneCoefficients(const NormLayout& rows, int64_t channels, float* memory)
        : lanes_(rows.channels), channels_(channels), values_(memory) {}

    float* letter(int which, int64_t n, int64_t lane) const {
        return values_ + (n * kLetters + which) * lanes_ + lane;
    }
    void set(int which, int64_t n, int64_t c, float value) const {
        float* values = letter(which, n, 0);
        for (int64_t lane = c; lane < lanes_; lane += channels_) values[lane] = value;
    }
    Coefficients of(int64_t n, int64_t lane) const {
        return {letter(0, n, lane), letter(1, n, lane), letter(2, n, lane), letter(3, n, lane),
                letter(4, n, lane)};
    }
    // mean (less x_bias), A and B of a channel.
    void set_affine(const NormParameters& p, int64_t n, int64_t c, float mean, float rstd) const {
        float slope, offset;
        affine(p, n, c, rstd, &slope, &offset);
        set(0, n, c, mean - raise(p, c));
        set(1, n, c, slope);
        set(2, n, c, offset);
    }

  private:
    int64_t lanes_, channels_;
    float* values_;
};

// Calls body(lane) on the lanes of group g, whose first channel is g * size.
template <class Body>
void for_lanes(int64_t g, int64_t size, int64_t channels, int64_t lanes, const Body& body) {
    for (int64_t first = g * size; first < lanes; first += channels) {
        for (int64_t lane = first; lane < first + size; ++lane) body(lane);
    }
}

// Calls body(first row, first lane, tile, rows before it) on the tiles of a span.
template <class Body>
void for_tiles(const Partials& partials, int64_t span, const Body& body) {
    const int64_t rows = partials.count(span);
    for (int64_t r = 0; r < rows; r += kRows) {
        for (int64_t lane = 0; lane < partials.lanes; lane += kLanes) {
            const Tile tile{std::min(kRows, rows - r), std::min(kLanes, partials.lanes - lane)};
            body(span * partials.rows + r, lane, tile, r);
        }
    }
}

bool image_by_image(int64_t images, int threads) { return images >= threads; }

// Floats in which a thread keeps du of the image it works on; none if that would not stay in the cache.
int64_t kept_floats(const NormLayout& where, int threads) {
    const int64_t elements = where.channels * where.spatial;
    return image_by_image(where.images, threads) && elements <= kKept ? elements : 0;
}

// start(n), then first(n, span, thread), middle(n) and last(n, span, thread): image by image where there are
// enough images for the threads, which keeps an image in the cache, else stage by stage.
template <class Start, class First, class Middle, class Last>
void in_stages(const NormLayout& where, int64_t spans, int threads, const Start& start, const First& first,
               const Middle& middle, const Last& last) {
    const int64_t elements = where.channels * where.spatial, images = where.images;
    if (image_by_image(images, threads)) {
        const int64_t crew = std::clamp<int64_t>(images / items_per_thread(elements), 1, threads);
        std::atomic<int64_t> next{0};
        for_tasks(crew, crew, [&](int64_t thread) {
            for (int64_t n = next++; n < images; n = next++) {
                start(n);
                for (int64_t span = 0; span < spans; ++span) first(n, span, thread);
                middle(n);
                for (int64_t span = 0; span < spans; ++span) last(n, span, thread);
            }
        });
        return;
    }
    const auto in_spans = [&](const auto& stage) {
        parallel_for(images * spans, items_per_thread(elements / spans), threads,
                     [&](int64_t begin, int64_t end) {
                         for (int64_t item = begin; item < end; ++item) stage(item / spans, item % spans, 0);
                     });
    };
    for (int64_t n = 0; n < images; ++n) start(n);
    in_spans(first);
    for (int64_t n = 0; n < images; ++n) middle(n);
    in_spans(last);
}

}  // namespace

int64_t channels_last_floats(const NormLayout& where, int threads) {
    // Where pixels lie apart, rows are shorter and less is needed.
    const NormLayout rows = in_rows(where, pixels_per_row(where, true));
    return Partials::size_of(rows, kNumbers) + rows.images * rows.channels * kLetters +
           kept_floats(where, threads) * threads;
}

void forward_channels_last(int dtype, const Input& x, const Output& y, const Statistics& s,
                           const NormParameters& p, double eps, float* workspace, int threads) {
    const int64_t channels = x.where.channels, size = channels / p.groups;
    const int64_t pixels = pixels_per_row(x.where, dense(x.where) && dense(y.where));
    const NormLayout rows_x = in_rows(x.where, pixels), rows_y = in_rows(y.where, pixels);
    const int64_t pitch_x = rows_x.stride_spatial, pitch_y = rows_y.stride_spatial;
    const Partials partials(rows_x, 3, workspace);
    const LaneCoefficients coefficients(rows_x, channels, workspace + Partials::size_of(rows_x, 3));
    const auto start = [](int64_t) {};  // the first moments of a span begin its numbers
    const auto moments = [&](int64_t n, int64_t span, int64_t) {
        float* base = partials.number(0, n, span);
        float* offset = partials.number(1, n, span);
        float* squares = partials.number(2, n, span);
        for_tiles(partials, span, [&](int64_t row, int64_t lane, const Tile& tile, int64_t done) {
            merge_moments(dtype, read(x, dtype, n, row * pitch_x + lane, pitch_x), tile, done,
                          {base + lane, offset + lane, squares + lane});
        });
    };
    const auto finish = [&](int64_t n) {
        const double lanes = static_cast<double>(size * pixels);
        for (int64_t g = 0; g < p.groups; ++g) {
            Moments all;
            for (int64_t span = 0; span < partials.spans; ++span) {
                const float* base = partials.number(0, n, span);
                const float* offset = partials.number(1, n, span);
                const float* squares = partials.number(2, n, span);
                const double count = static_cast<double>(partials.count(span));
                double middle = 0.0, spread = 0.0;
                const auto mean = [&](int64_t lane) {
                    return static_cast<double>(base[lane]) + offset[lane] + raise(p, lane % channels);
                };
                for_lanes(g, size, channels, partials.lanes, [&](int64_t lane) { middle += mean(lane); });
                middle /= lanes;
                for_lanes(g, size, channels, partials.lanes, [&](int64_t lane) {
                    const double delta = mean(lane) - middle;
                    spread += squares[lane] + count * delta * delta;
                });
                merge(&all, count * lanes, middle, spread);
            }
            const int64_t item = n * p.groups + g;
            s.mean[item] = static_cast<float>(all.mean);
            s.rstd[item] = reciprocal_deviation(all.squares / all.count, eps);
            for (int64_t c = g * size; c < (g + 1) * size; ++c) {
                coefficients.set_affine(p, n, c, s.mean[item], s.rstd[item]);
            }
        }
    };
    const auto apply = [&](int64_t n, int64_t span, int64_t) {
        for_tiles(partials, span, [&](int64_t row, int64_t lane, const Tile& tile, int64_t) {
            apply_norm(dtype, p.silu, read(x, dtype, n, row * pitch_x + lane, pitch_x),
                       write(y, dtype, n, row * pitch_y + lane, pitch_y), tile, coefficients.of(n, lane));
        });
    };
    in_stages(x.where, partials.spans, threads, start, moments, finish, apply);
}

void backward_channels_last(int dtype, const Input& dy, const Input& x, const Output& dx,
                            const Input& residual, const Statistics& s, const NormParameters& p,
                            float* workspace, int threads) {
    const int64_t channels = x.where.channels, size = channels / p.groups;
    const bool all_dense =
        dense(x.where) && dense(dy.where) && dense(dx.where) && (!residual.data || dense(residual.where));
    const int64_t pixels = pixels_per_row(x.where, all_dense);
    const NormLayout rows = in_rows(x.where, pixels);
    const int64_t pitch_x = rows.stride_spatial, pitch_dy = dy.where.stride_spatial * pixels;
    const int64_t pitch_dx = dx.where.stride_spatial * pixels;
    const int64_t pitch_residual = residual.where.stride_spatial * pixels;
    const Partials partials(rows, 2, workspace);
    float* rest = workspace + Partials::size_of(rows, 2);
    const LaneCoefficients coefficients(rows, channels, rest);
    rest += rows.images * rows.channels * kLetters;
    const int64_t kept = kept_floats(x.where, threads);
    const auto du = [&](int64_t thread, int64_t row, int64_t lane, const Tile& tile) {
        return kept ? rest + thread * kept + row * partials.lanes + lane * tile.rows : nullptr;
    };
    const auto start = [&](int64_t n) {
        partials.clear(n);
        for (int64_t c = 0; c < channels; ++c) {
            const int64_t item = n * p.groups + c / size;
            coefficients.set_affine(p, n, c, s.mean[item], s.rstd[item]);
        }
    };
    const auto sums = [&](int64_t n, int64_t span, int64_t thread) {
        for_tiles(partials, span, [&](int64_t row, int64_t lane, const Tile& tile, int64_t) {
            add_sums(dtype, p.silu, read(dy, dtype, n, row * pitch_dy + lane, pitch_dy),
                     read(x, dtype, n, row * pitch_x + lane, pitch_x), tile, coefficients.of(n, lane),
                     partials.number(0, n, span) + lane, partials.number(1, n, span) + lane,
                     du(thread, row, lane, tile));
        });
    };
    const auto finish = [&](int64_t n) {
        for (int64_t g = 0; g < p.groups; ++g) {
            double total = 0.0, moment = 0.0;
            for (int64_t span = 0; span < partials.spans; ++span) {
                for_lanes(g, size, channels, partials.lanes, [&](int64_t lane) {
                    const double slope = *coefficients.letter(1, n, lane);
                    total += slope * partials.number(0, n, span)[lane];
                    moment += slope * partials.number(1, n, span)[lane];
                });
            }
            const double count = static_cast<double>(size * x.where.spatial);
            const double rstd = s.rstd[n * p.groups + g];
            for (int64_t c = g * size; c < (g + 1) * size; ++c) {
                coefficients.set(3, n, c, static_cast<float>(-rstd * rstd * moment / count));
                coefficients.set(4, n, c, static_cast<float>(-total / count));
            }
        }
    };
    const auto apply = [&](int64_t n, int64_t span, int64_t thread) {
        for_tiles(partials, span, [&](int64_t row, int64_t lane, const Tile& tile, int64_t) {
            apply_gradient(dtype, p.silu, read(dy, dtype, n, row * pitch_dy + lane, pitch_dy),
                           read(x, dtype, n, row * pitch_x + lane, pitch_x), du(thread, row, lane, tile),
                           read(residual, dtype, n, row * pitch_residual + lane, pitch_residual),
                           write(dx, dtype, n, row * pitch_dx + lane, pitch_dx), tile,
                           coefficients.of(n, lane));
        });
    };
    in_stages(x.where, partials.spans, threads, start, sums, finish, apply);
}

}  // namespace sda::cpu
