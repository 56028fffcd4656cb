#include "reverse_step.h"

#include <algorithm>

#include "../status.h"
#include "clones.h"
#include "parallel.h"
#include "philox_normal.h"
#include "prefetch.h"
#include "rows.h"

namespace sda::cpu {
namespace {

constexpr int64_t kChunk = 256;            // elements at a time: what is read stays in the cache
constexpr int64_t kGrainElements = 65536;  // worth a thread
constexpr int64_t kDrawnElements = 4 * kDrawnBlocks;

// Room for one chunk of everything that is not float32 side by side in memory.
struct Buffers {
    float x[kChunk], eps[kChunk], v[kChunk], cotangent[kChunk], through_network[kChunk], result[kChunk];
    float noise[kChunk], drawn[kChunk + 2 * kDrawnElements];
};

// What one chunk is computed from, float32 side by side; v, noise and the guidance's two may be null.
// `result` may be `x`: every element is read before it is written.
struct Chunk {
    const float *x, *eps, *v, *noise, *cotangent, *through_network;
    float* result;
    int64_t count;
};

enum class Noise { kNone, kFixed, kLearned };

template <bool kClip, Noise kNoise, bool kGuided>
SDA_INLINE void compute_as(const Chunk& k, const Coefficients& c, float sigma, float weight) {
    const float *x = k.x, *eps = k.eps, *v = k.v, *noise = k.noise;
    const float *cotangent = k.cotangent, *through_network = k.through_network;
    float* result = k.result;
#pragma GCC ivdep
    for (int64_t i = 0; i < k.count; ++i) {
        float y = posterior_mean(c, kClip, x[i], eps[i]);
        if (kNoise == Noise::kLearned) y = add(y, mul(learned_sigma(c, v[i]), noise[i]));
        if (kNoise == Noise::kFixed) y = add(y, mul(sigma, noise[i]));
        if (kGuided) y = add(y, mul(weight, gradient(c, cotangent[i], through_network[i])));
        result[i] = y;
    }
}

template <bool kClip, Noise kNoise>
SDA_INLINE void compute_with(const Chunk& k, const Coefficients& c, float sigma, float weight) {
    if (k.cotangent != nullptr) {
        compute_as<kClip, kNoise, true>(k, c, sigma, weight);
    } else {
        compute_as<kClip, kNoise, false>(k, c, sigma, weight);
    }
}

template <bool kClip>
SDA_INLINE void compute_clipped(const Chunk& k, const Coefficients& c, float sigma, float weight) {
    if (k.noise == nullptr) {
        compute_with<kClip, Noise::kNone>(k, c, sigma, weight);
    } else if (k.v == nullptr) {
        compute_with<kClip, Noise::kFixed>(k, c, sigma, weight);
    } else {
        compute_with<kClip, Noise::kLearned>(k, c, sigma, weight);
    }
}

SDA_CLONES void compute(const Chunk& k, Coefficients c, bool clip, float weight) {
    const float sigma = fixed_sigma(c);
    if (clip) {
        compute_clipped<true>(k, c, sigma, weight);
    } else {
        compute_clipped<false>(k, c, sigma, weight);
    }
}

// Some pixels of an image, `lanes` channels from `channel` on: all that lie interleaved in the result, or
// one.
struct Place {
    int64_t image, channel, pixel;
    int64_t count, lanes;
};

int64_t at(const Pixels& tensor, const Place& where, int64_t channel) {
    return where.image * tensor.stride_image + channel * tensor.stride_channel +
           where.pixel * tensor.stride_pixel;
}

Row row_of(const Pixels& tensor, const Place& where) {
    return {where.count, where.lanes, tensor.stride_pixel, tensor.stride_channel};
}

// The values of a place, from `channel` on. Those of the next place are asked for meanwhile: the processor's
// own prefetching stops at every page.
const float* read(float* buffer, const Pixels& from, int dtype, const Place& where, int64_t channel) {
    const int64_t element = at(from, where, channel), length = where.count * from.stride_pixel;
    prefetch(static_cast<const char*>(from.data) + (element + length) * bytes(dtype), length * bytes(dtype));
    return read_row(buffer, from.data, dtype, element, row_of(from, where));
}

// The noise of a place. A channel's elements follow each other; in `drawn` there is room for one of them.
const float* draw(float* buffer, float* drawn, const ReverseStep& s, const Place& where) {
    for (int64_t c = 0; c < where.lanes; ++c) {
        const int64_t first = (where.channel + c) * s.pixels + where.pixel, block = first / 4;
        draw_normals(drawn, block, (first + where.count + 3) / 4 - block, s.seed,
                     static_cast<uint32_t>(s.position[1]), static_cast<uint64_t>(s.identities[where.image]));
        const float* noise = drawn + first % 4;
        if (where.lanes == 1) return noise;
        for (int64_t i = 0; i < where.count; ++i) buffer[i * where.lanes + c] = noise[i];
    }
    return buffer;
}

void step_at(const Place& where, const ReverseStep& s, const Coefficients& c, Buffers& buffers) {
    const int64_t channel = where.channel;
    Chunk chunk{};
    chunk.x = read(buffers.x, s.x, kFloat32, where, channel);
    chunk.eps = read(buffers.eps, s.out, s.dtype, where, channel);
    if (c.noise_scale != 0.0f) {
        chunk.noise = s.noise.data != nullptr ? read(buffers.noise, s.noise, kFloat32, where, channel)
                                              : draw(buffers.noise, buffers.drawn, s, where);
        if (s.learned) chunk.v = read(buffers.v, s.out, s.dtype, where, s.channels + channel);
    }
    float weight = 0.0f;
    if (s.cotangent.data != nullptr) {
        chunk.cotangent = read(buffers.cotangent, s.cotangent, s.dtype, where, channel);
        chunk.through_network =
            read(buffers.through_network, s.through_network, s.through_network_dtype, where, channel);
        weight = guidance_weight(s, where.image);
    }
    const int64_t element = at(s.result, where, channel);
    const Row row = row_of(s.result, where);
    chunk.result = row.side_by_side() ? static_cast<float*>(s.result.data) + element : buffers.result;
    chunk.count = where.count * where.lanes;
    if (row.side_by_side()) prefetch_to_write(chunk.result + chunk.count, chunk.count);
    compute(chunk, c, s.clip, weight);
    if (chunk.result == buffers.result) write_row(s.result.data, kFloat32, element, row, buffers.result);
}

// The channels to compute together: all of them where they lie side by side in the result, else one.
int64_t lanes_of(const ReverseStep& s) {
    const bool interleaved = s.result.stride_channel == 1 && s.result.stride_pixel != 1;
    return interleaved && s.channels <= kChunk / 4 ? s.channels : 1;
}

}  // namespace

int reverse_step(const ReverseStep& s, int threads) {
    if (!known(s.dtype)) return kBadDtype;
    if (!valid(s)) return kBadArgument;
    const Coefficients c = coefficients(s);
    // An item is a range of pixels with all channels, of which an interleaved tensor has parts of one cache
    // line.
    const int64_t lanes = lanes_of(s), pixels = kChunk / std::max<int64_t>(1, lanes) / 4 * 4;
    const int64_t chunks = (s.pixels + pixels - 1) / pixels;
    const int64_t grain = kGrainElements / (pixels * std::max<int64_t>(1, s.channels));
    parallel_for(s.images * chunks, std::max<int64_t>(1, grain), threads, [&](int64_t begin, int64_t end) {
        Buffers buffers;
        for (int64_t item = begin; item < end; ++item) {
            const int64_t pixel = item % chunks * pixels;
            Place where{item / chunks, 0, pixel, std::min(pixels, s.pixels - pixel), lanes};
            for (; where.channel < s.channels; where.channel += lanes) step_at(where, s, c, buffers);
        }
    });
    return kOk;
}

}  // namespace sda::cpu
