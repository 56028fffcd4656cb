#include "guidance.h"

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "../step_table.h"
#include "clones.h"
#include "parallel.h"
#include "rows.h"

// One channel of an image, or all of them interleaved as channels_last has them, is one item of work. Its
// rows are then `width` = n * lanes floats side by side, and the same loops over them serve both. All of an
// item's intermediate results stay in the cache; x and eps are read once, x0 and cotangent written once.

namespace sda::cpu {
namespace {

constexpr int64_t kBlock = 16;  // of float32: enough to fill any vector unit
constexpr int64_t kAlignment = 64;
constexpr int64_t kGrainElements = 65536;  // worth a thread

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// -- Loops over rows ---------------------------------------------------------------------------------------

SDA_CLONES void predict(float* x0, uint8_t* mask, const float* x, const float* eps, float a, float b,
                        int64_t count) {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
        const float raw = predict_raw(a, b, x[i], eps[i]);
        x0[i] = clamp_unit(raw);
        mask[i] = x0[i] == raw;
    }
}

// sum += weights[0] rows[0] + weights[1] rows[1] + ..., from left to right
SDA_CLONES void add_rows(float* sum, const float* rows, const float* weights, int64_t row_count,
                         int64_t count) {
    int64_t k = 0;
    for (; k + 4 <= row_count; k += 4) {
        const float *r0 = rows + k * count, *r1 = r0 + count, *r2 = r1 + count, *r3 = r2 + count;
        const float w0 = weights[k], w1 = weights[k + 1], w2 = weights[k + 2], w3 = weights[k + 3];
#pragma GCC ivdep
        for (int64_t i = 0; i < count; ++i) {
            sum[i] = sum[i] + w0 * r0[i] + w1 * r1[i] + w2 * r2[i] + w3 * r3[i];
        }
    }
    for (; k < row_count; ++k) {
        const float* row = rows + k * count;
        const float w = weights[k];
#pragma GCC ivdep
        for (int64_t i = 0; i < count; ++i) sum[i] += w * row[i];
    }
}

// Columns apart by the factor D side by side: phases[k][q] = row[D q + k - lead], zero outside.
SDA_CLONES void split_phases(float* phases, int64_t pitch, const float* row, int64_t size, int64_t factor,
                             int64_t lanes) {
    for (int64_t k = 0; k < factor; ++k) {
        const int64_t start = k - lead(factor);
        const int64_t first = (-start + factor - 1) / factor;
        const int64_t last = (size - start + factor - 1) / factor;
        float* phase = phases + k * pitch;
        std::fill(phase, phase + first * lanes, 0.0f);
        std::fill(phase + last * lanes, phase + pitch, 0.0f);
        if (lanes == 1) {
            for (int64_t q = first; q < last; ++q) phase[q] = row[factor * q + start];
        } else {
            for (int64_t q = first; q < last; ++q) {
                for (int64_t c = 0; c < lanes; ++c)
                    phase[q * lanes + c] = row[(factor * q + start) * lanes + c];
            }
        }
    }
}

// low[j] = reference[j] - sum over taps k + D i of weights[k + D i][j] phases[k][j + i]
SDA_CLONES void contract(float* low, const float* reference, const float* phases, const float* weights,
                         int64_t pitch, int64_t factor, int64_t lanes, int64_t count) {
    for (int64_t j = 0; j < count; j += kBlock) {
        float sum[kBlock] = {};
        for (int64_t i = 0; i < 4; ++i) {
            for (int64_t k = 0; k < factor; ++k) {
                const float* w = weights + (k + factor * i) * pitch + j;
                const float* v = phases + k * pitch + j + i * lanes;
                for (int64_t l = 0; l < kBlock; ++l) sum[l] += w[l] * v[l];
            }
        }
        for (int64_t l = 0; l < kBlock; ++l) low[j + l] = reference[j + l] - sum[l];
    }
}

// smooth[j] = sum over s of weights[s][j] low[j + s - 3]: G along a row
SDA_CLONES void smooth_row(float* smooth, const float* low, const float* weights, int64_t pitch,
                           int64_t lanes, int64_t count) {
    for (int64_t j = 0; j < count; j += kBlock) {
        float sum[kBlock] = {};
        for (int64_t s = 0; s <= 2 * kGramReach; ++s) {
            const float* w = weights + s * pitch + j;
            const float* v = low + j + (s - kGramReach) * lanes;
            for (int64_t l = 0; l < kBlock; ++l) sum[l] += w[l] * v[l];
        }
        for (int64_t l = 0; l < kBlock; ++l) smooth[j + l] = sum[l];
    }
}

SDA_CLONES void add_products(float* sums, const float* a, const float* b, int64_t count) {
    for (int64_t j = 0; j < count; j += kBlock) {
        for (int64_t l = 0; l < kBlock; ++l) sums[l] += a[j + l] * b[j + l];
    }
}

// phase[p] = sum over i of smooth[p - i] weights[D i][p - i], the transpose of one phase of `contract`
SDA_CLONES void expand(float* phase, const float* smooth, const float* weights, int64_t pitch, int64_t factor,
                       int64_t lanes, int64_t count) {
    for (int64_t j = 0; j < count; j += kBlock) {
        float sum[kBlock] = {};
        for (int64_t i = 0; i < 4; ++i) {
            const float* w = weights + factor * i * pitch + j - i * lanes;
            const float* v = smooth + j - i * lanes;
            for (int64_t l = 0; l < kBlock; ++l) sum[l] += w[l] * v[l];
        }
        for (int64_t l = 0; l < kBlock; ++l) phase[j + l] = sum[l];
    }
}

// The reverse of `split_phases`, for one phase k: row[D q + k - lead] = phase[q]
void join_phase(float* row, const float* phase, int64_t k, int64_t size, int64_t factor, int64_t lanes) {
    const int64_t start = k - lead(factor);
    const int64_t first = (-start + factor - 1) / factor;
    const int64_t last = (size - start + factor - 1) / factor;
    if (lanes == 1) {
        for (int64_t q = first; q < last; ++q) row[factor * q + start] = phase[q];
    } else {
        for (int64_t q = first; q < last; ++q) {
            for (int64_t c = 0; c < lanes; ++c) row[(factor * q + start) * lanes + c] = phase[q * lanes + c];
        }
    }
}

SDA_CLONES void spread(float* to, const float* const rows[4], const float weights[4], const uint8_t* mask,
                       int64_t count) {
    const float *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
    const float w0 = weights[0], w1 = weights[1], w2 = weights[2], w3 = weights[3];
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
        const float sum = w0 * r0[i] + w1 * r1[i] + w2 * r2[i] + w3 * r3[i];
        to[i] = mask[i] ? sum : 0.0f;
    }
}

// -- One item ----------------------------------------------------------------------------------------------

struct Shape {
    int64_t size, low, factor, lanes;
    int64_t width;  // of an image's row
    int64_t count;  // of a low row, rounded up to whole blocks
    int64_t pitch;  // of a low row, with three columns of zeros on each side

    explicit Shape(const GuidanceTensors& t)
        : size(t.size),
          low(t.low),
          factor(t.size / t.low),
          lanes(t.interleaved ? t.channels : 1),
          width(size * lanes),
          count(round_up((low + kGramReach) * lanes, kBlock)),
          pitch(round_up(count + 2 * kGramReach * lanes, kBlock)) {}

    int64_t margin() const { return kGramReach * lanes; }
};

// The buffers of one thread. Low rows begin `margin` floats into their pitch; the rest of them stays zero.
struct Scratch {
    float *x_row{}, *eps_row{}, *x0_rows{}, *cotangent_row{};
    float* tall{};  // [m, width]: first P x0, then smooth P
    float* phases{};
    float *down_taps{}, *gram_taps{};  // of every column: [4D, pitch] and [7, pitch]
    float *reference{}, *low{}, *across{}, *smooth{};
    uint8_t* mask{};

    // Carves the buffers out of memory at `base` (null to count only); returns the bytes taken.
    int64_t carve(const Shape& s, char* base) {
        int64_t used = 0;
        const auto take = [&](auto** pointer, int64_t count) {
            if (base != nullptr) *pointer = reinterpret_cast<std::decay_t<decltype(*pointer)>>(base + used);
            used += round_up(count * static_cast<int64_t>(sizeof(**pointer)), kAlignment);
        };
        take(&x_row, s.width);
        take(&eps_row, s.width);
        take(&cotangent_row, s.width);
        take(&x0_rows, s.factor * s.width);
        take(&tall, s.low * s.width);
        take(&phases, s.factor * s.pitch);
        take(&down_taps, 4 * s.factor * s.pitch);
        take(&gram_taps, (2 * kGramReach + 1) * s.pitch);
        take(&reference, s.count);
        take(&low, s.low * s.pitch);
        take(&across, s.low * s.pitch);
        take(&smooth, s.low * s.pitch);
        take(&mask, s.size * s.width);
        return used;
    }

    // Sets the taps, and the zeros around the low rows.
    void prepare(const Shape& s, const GuidanceTensors& t) {
        std::fill(down_taps, down_taps + 4 * s.factor * s.pitch, 0.0f);
        std::fill(gram_taps, gram_taps + (2 * kGramReach + 1) * s.pitch, 0.0f);
        std::fill(low, low + s.low * s.pitch, 0.0f);
        std::fill(smooth, smooth + s.low * s.pitch, 0.0f);
        std::fill(reference, reference + s.count, 0.0f);
        for (int64_t j = 0; j < s.low; ++j) {
            const auto set = [&](float* row, float value) {
                std::fill_n(row + s.margin() + j * s.lanes, s.lanes, value);
            };
            for (int64_t tap = 0; tap < 4 * s.factor; ++tap) {
                const int64_t column = s.factor * j + tap - lead(s.factor);
                if (column < 0 || column >= s.size) continue;
                set(down_taps + tap * s.pitch, t.down[j * s.size + column]);
            }
            for (int64_t tap = 0; tap <= 2 * kGramReach; ++tap) {
                const int64_t column = j + tap - kGramReach;
                if (column < 0 || column >= s.low) continue;
                set(gram_taps + tap * s.pitch, t.gram[j * s.low + column]);
            }
        }
    }
};

struct Item {
    int64_t image, channel;  // of several interleaved channels the first
};

int64_t at(const ImageStrides& strides, const Item& item, int64_t h) {
    return item.image * strides.image + item.channel * strides.channel + h * strides.row;
}

Row row_of(const ImageStrides& strides, const Shape& s) {
    return {s.size, s.lanes, strides.column, strides.channel};
}

// x0 and its mask, and P x0 into `tall`, in one pass over x and eps.
void reduce_rows(const GuidanceTensors& t, const Shape& s, const Item& item, Scratch& m) {
    const auto [a, b] = prediction_of(t);
    const Row x_row = row_of(t.x_strides, s), out_row = row_of(t.out_strides, s);
    const Row x0_row = row_of(t.x0_strides, s);
    std::fill(m.tall, m.tall + s.low * s.width, 0.0f);
    for (int64_t q = 1; q <= s.low + 1; ++q) {
        const int64_t first = std::max<int64_t>(0, s.factor * q - lead(s.factor));
        const int64_t last = std::min(s.size, s.factor * (q + 1) - lead(s.factor));
        for (int64_t h = first; h < last; ++h) {
            const float* x = read_row(m.x_row, t.x, kFloat32, at(t.x_strides, item, h), x_row);
            const float* eps = read_row(m.eps_row, t.out, t.dtype, at(t.out_strides, item, h), out_row);
            float* x0 = m.x0_rows + (h - first) * s.width;
            predict(x0, m.mask + h * s.width, x, eps, a, b, s.width);
            if (t.x0 != nullptr) write_row(t.x0, kFloat32, at(t.x0_strides, item, h), x0_row, x0);
        }
        for (int64_t r = std::max<int64_t>(0, q - 3); r <= std::min(q, s.low - 1); ++r) {
            add_rows(m.tall + r * s.width, m.x0_rows, t.down + r * s.size + first, last - first, s.width);
        }
    }
}

// low, smooth and their inner product.
float filter(const GuidanceTensors& t, const Shape& s, const Item& item, Scratch& m) {
    const int64_t plane = s.low * s.low;
    const float* reference = t.reference_down + (item.image * t.channels + item.channel) * plane;
    for (int64_t r = 0; r < s.low; ++r) {
        for (int64_t c = 0; c < s.lanes; ++c) {
            const float* from = reference + c * plane + r * s.low;
            for (int64_t j = 0; j < s.low; ++j) m.reference[j * s.lanes + c] = from[j];
        }
        float* low = m.low + r * s.pitch + s.margin();
        split_phases(m.phases, s.pitch, m.tall + r * s.width, s.size, s.factor, s.lanes);
        contract(low, m.reference, m.phases, m.down_taps + s.margin(), s.pitch, s.factor, s.lanes, s.count);
        // Beyond the last column there is nothing, even if NaN times a weight of zero was added there.
        std::fill(low + s.low * s.lanes, low + s.count, 0.0f);
    }
    for (int64_t r = 0; r < s.low; ++r) {
        smooth_row(m.across + r * s.pitch, m.low + r * s.pitch + s.margin(), m.gram_taps + s.margin(),
                   s.pitch, s.lanes, s.count);
    }
    float sums[kBlock] = {};
    for (int64_t r = 0; r < s.low; ++r) {
        float* smooth = m.smooth + r * s.pitch + s.margin();
        const int64_t first = std::max<int64_t>(0, r - kGramReach);
        const int64_t last = std::min(s.low - 1, r + kGramReach);
        std::fill(smooth, smooth + s.count, 0.0f);
        for (int64_t k = first; k <= last; ++k) {
            add_rows(smooth, m.across + k * s.pitch, t.gram + r * s.low + k, 1, s.count);
        }
        add_products(sums, smooth, m.low + r * s.pitch + s.margin(), s.count);
    }
    for (int64_t half = kBlock / 2; half > 0; half /= 2) {
        for (int64_t l = 0; l < half; ++l) sums[l] += sums[l + half];
    }
    return sums[0];
}

// cotangent = P^T smooth P, masked.
void spread_rows(const GuidanceTensors& t, const Shape& s, const Item& item, Scratch& m) {
    for (int64_t r = 0; r < s.low; ++r) {
        for (int64_t k = 0; k < s.factor; ++k) {
            expand(m.phases, m.smooth + r * s.pitch + s.margin(), m.down_taps + k * s.pitch + s.margin(),
                   s.pitch, s.factor, s.lanes, s.count);
            join_phase(m.tall + r * s.width, m.phases, k, s.size, s.factor, s.lanes);
        }
    }
    for (int64_t h = 0; h < s.size; ++h) {
        const int64_t q = (h + lead(s.factor)) / s.factor;
        const float* rows[4];
        float weights[4];
        for (int64_t i = 0; i < 4; ++i) {
            const int64_t r = q - 3 + i;
            const bool exists = r >= 0 && r < s.low;
            rows[i] = m.tall + (exists ? r : 0) * s.width;
            weights[i] = exists ? t.down[r * s.size + h] : 0.0f;
        }
        const int64_t offset = ((item.image * t.channels + item.channel) * s.size + h * s.lanes) * s.size;
        const uint8_t* mask = m.mask + h * s.width;
        if (t.dtype == kFloat32) {
            spread(static_cast<float*>(t.cotangent) + offset, rows, weights, mask, s.width);
            continue;
        }
        spread(m.cotangent_row, rows, weights, mask, s.width);
        write_row(t.cotangent, t.dtype, offset, {s.width, 1, 1, 0}, m.cotangent_row);
    }
}

// -- All items ---------------------------------------------------------------------------------------------

int64_t items_of(const GuidanceTensors& t, const Shape& s) { return t.images * (t.channels / s.lanes); }

int64_t slots_of(const GuidanceTensors& t, const Shape& s, int threads) {
    const int64_t items = items_of(t, s);
    const int64_t worth = items * s.size * s.width / kGrainElements;
    return std::max<int64_t>(1, std::min({static_cast<int64_t>(threads), items, worth}));
}

}  // namespace

int64_t guidance_workspace(const GuidanceTensors& t, int threads) {
    if (!valid(t)) return 0;
    const Shape s(t);
    const int64_t sums = round_up(items_of(t, s) * static_cast<int64_t>(sizeof(float)), kAlignment);
    return kAlignment + sums + slots_of(t, s, threads) * Scratch().carve(s, nullptr);
}

int guidance(const GuidanceTensors& t, void* workspace, int threads) {
    if (!known(t.dtype)) return kBadDtype;
    if (!valid(t)) return kBadArgument;
    const Shape s(t);
    const int64_t items = items_of(t, s), planes = t.channels / s.lanes, slots = slots_of(t, s, threads);
    char* base = static_cast<char*>(workspace);
    base += -reinterpret_cast<uintptr_t>(base) % kAlignment;
    float* sums = reinterpret_cast<float*>(base);
    base += round_up(items * static_cast<int64_t>(sizeof(float)), kAlignment);
    const int64_t scratch_bytes = Scratch().carve(s, nullptr);
    // A slot is a scratch and whoever computes with it; there are as many as threads.
    std::atomic<int64_t> next{0};
    for_tasks(slots, slots, [&](int64_t slot) {
        Scratch scratch;
        scratch.carve(s, base + slot * scratch_bytes);
        scratch.prepare(s, t);
        for (int64_t i = next++; i < items; i = next++) {
            const Item item{i / planes, i % planes};
            reduce_rows(t, s, item, scratch);
            sums[i] = filter(t, s, item, scratch);
            spread_rows(t, s, item, scratch);
        }
    });
    for (int64_t n = 0; n < t.images; ++n) {
        t.squares[n] = 0.0f;
        for (int64_t p = 0; p < planes; ++p) t.squares[n] += sums[n * planes + p];
    }
    return kOk;
}

}  // namespace sda::cpu
