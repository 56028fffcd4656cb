#include "reverse_step.h"

#include <algorithm>

#include "../half.h"
#include "../status.h"
#include "clones.h"
#include "parallel.h"
#include "philox_normal.h"
#include "prefetch.h"

namespace sda::cpu {
namespace {

constexpr int64_t kChunk = 1024;           // pixels of one channel at a time: what is read stays in the cache
constexpr int64_t kGrainElements = 65536;  // worth a thread
constexpr int64_t kDrawnElements = 4 * kDrawnBlocks;

int64_t bytes(int dtype) { return dtype == kFloat32 ? 4 : 2; }

// Room for one chunk of everything that is not float32 side by side in memory.
struct Buffers {
    float x[kChunk], eps[kChunk], v[kChunk], cotangent[kChunk], through_network[kChunk], result[kChunk];
    float noise[kChunk + 2 * kDrawnElements];
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

SDA_CLONES void widen_bfloat16(float* to, const Bfloat16* from, int64_t count, int64_t stride) {
    if (stride == 1) {
        for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i * stride]);
    }
}

SDA_CLONES void widen_float16(float* to, const Float16* from, int64_t count, int64_t stride) {
    if (stride == 1) {
        for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i * stride]);
    }
}

// `count` values from `element` on, as float32: where they lie, if they lie side by side, else in the buffer.
// Those of the next chunk are asked for meanwhile: the processor's own prefetching stops at every page.
const float* read(float* buffer, const Pixels& from, int dtype, int64_t element, int64_t count) {
    prefetch(static_cast<const char*>(from.data) + (element + count * from.stride_pixel) * bytes(dtype),
             count * from.stride_pixel * bytes(dtype));
    if (dtype == kBfloat16) {
        widen_bfloat16(buffer, static_cast<const Bfloat16*>(from.data) + element, count, from.stride_pixel);
        return buffer;
    }
    if (dtype == kFloat16) {
        widen_float16(buffer, static_cast<const Float16*>(from.data) + element, count, from.stride_pixel);
        return buffer;
    }
    const float* data = static_cast<const float*>(from.data) + element;
    if (from.stride_pixel == 1) return data;
    for (int64_t i = 0; i < count; ++i) buffer[i] = data[i * from.stride_pixel];
    return buffer;
}

int64_t at(const Pixels& tensor, int64_t n, int64_t channel, int64_t pixel) {
    return n * tensor.stride_image + channel * tensor.stride_channel + pixel * tensor.stride_pixel;
}

// The noise of `count` elements of image n, from the logical element `first` on.
const float* draw(float* buffer, const ReverseStep& s, int64_t n, int64_t first, int64_t count) {
    const int64_t block = first / 4;
    draw_normals(buffer, block, (first + count + 3) / 4 - block, s.seed, static_cast<uint32_t>(s.position[1]),
                 static_cast<uint64_t>(s.identities[n]));
    return buffer + first % 4;
}

void step_chunk(const ReverseStep& s, const Coefficients& c, float weight, int64_t n, int64_t channel,
                int64_t pixel, int64_t count, Buffers& buffers) {
    float* target = static_cast<float*>(s.result.data) + at(s.result, n, channel, pixel);
    float* result = s.result.stride_pixel == 1 ? target : buffers.result;
    const auto half = [&](float* buffer, const Pixels& from, int64_t first) {
        return read(buffer, from, s.dtype, at(from, n, first, pixel), count);
    };
    Chunk chunk{};
    chunk.x = read(buffers.x, s.x, kFloat32, at(s.x, n, channel, pixel), count);
    chunk.eps = half(buffers.eps, s.out, channel);
    if (c.noise_scale != 0.0f) {
        chunk.noise = s.noise.data != nullptr
                          ? read(buffers.noise, s.noise, kFloat32, at(s.noise, n, channel, pixel), count)
                          : draw(buffers.noise, s, n, channel * s.pixels + pixel, count);
        if (s.learned) chunk.v = half(buffers.v, s.out, s.channels + channel);
    }
    if (s.cotangent.data != nullptr) {
        chunk.cotangent = half(buffers.cotangent, s.cotangent, channel);
        chunk.through_network = half(buffers.through_network, s.through_network, channel);
    }
    chunk.result = result;
    chunk.count = count;
    compute(chunk, c, s.clip, weight);
    if (result == buffers.result) {
        for (int64_t i = 0; i < count; ++i) target[i * s.result.stride_pixel] = result[i];
    }
}

}  // namespace

int reverse_step(const ReverseStep& s, int threads) {
    if (s.dtype != kFloat32 && s.dtype != kBfloat16 && s.dtype != kFloat16) return kBadDtype;
    if (!valid(s)) return kBadArgument;
    const Coefficients c = coefficients(s);
    // An item is a range of pixels with all channels, which lie side by side in channels_last.
    const int64_t chunks = (s.pixels + kChunk - 1) / kChunk;
    const int64_t grain = kGrainElements / (kChunk * std::max<int64_t>(1, s.channels));
    parallel_for(s.images * chunks, std::max<int64_t>(1, grain), threads, [&](int64_t begin, int64_t end) {
        Buffers buffers;
        for (int64_t item = begin; item < end; ++item) {
            const int64_t n = item / chunks;
            const int64_t pixel = item % chunks * kChunk;
            const int64_t count = std::min(kChunk, s.pixels - pixel);
            const float weight = s.cotangent.data != nullptr ? guidance_weight(s, n) : 0.0f;
            for (int64_t channel = 0; channel < s.channels; ++channel) {
                step_chunk(s, c, weight, n, channel, pixel, count, buffers);
            }
        }
    });
    return kOk;
}

}  // namespace sda::cpu
