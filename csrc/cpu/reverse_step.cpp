#include "reverse_step.h"

#include <algorithm>

#include "../half.h"
#include "../status.h"
#include "clones.h"
#include "parallel.h"
#include "philox_normal.h"

namespace sda::cpu {
namespace {

constexpr int64_t kChunk = 1024;           // pixels of one channel at a time: what is read stays in the cache
constexpr int64_t kGrainElements = 65536;  // worth a thread
constexpr int64_t kDrawnElements = 4 * kDrawnBlocks;

// Room for one chunk of everything that is not float32 side by side in memory.
struct Buffers {
    float x[kChunk], eps[kChunk], v[kChunk], cotangent[kChunk], through_network[kChunk], result[kChunk];
    float noise[kChunk + 2 * kDrawnElements];
};

// The loops. `result` may be `x`: every element is read before it is written.

SDA_CLONES void mean_of(float* result, const float* x, const float* eps, int64_t count, Coefficients c,
                        bool clip) {
    if (clip) {
#pragma GCC ivdep
        for (int64_t i = 0; i < count; ++i) result[i] = posterior_mean(c, true, x[i], eps[i]);
    } else {
#pragma GCC ivdep
        for (int64_t i = 0; i < count; ++i) result[i] = posterior_mean(c, false, x[i], eps[i]);
    }
}

SDA_CLONES void add_learned_noise(float* result, const float* v, const float* noise, int64_t count,
                                  Coefficients c) {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) result[i] += learned_sigma(c, v[i]) * noise[i];
}

SDA_CLONES void add_noise(float* result, const float* noise, int64_t count, float sigma) {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) result[i] += sigma * noise[i];
}

SDA_CLONES void add_guidance(float* result, const float* cotangent, const float* through_network,
                             int64_t count, Coefficients c, float weight) {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) result[i] += weight * gradient(c, cotangent[i], through_network[i]);
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
const float* read(float* buffer, const Pixels& from, int dtype, int64_t element, int64_t count) {
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
    const float* x = read(buffers.x, s.x, kFloat32, at(s.x, n, channel, pixel), count);
    const float* eps = read(buffers.eps, s.out, s.dtype, at(s.out, n, channel, pixel), count);
    float* target = static_cast<float*>(s.result.data) + at(s.result, n, channel, pixel);
    float* result = s.result.stride_pixel == 1 ? target : buffers.result;
    mean_of(result, x, eps, count, c, s.clip);
    if (c.noise_scale != 0.0f) {
        const float* noise =
            s.noise.data != nullptr
                ? read(buffers.noise, s.noise, kFloat32, at(s.noise, n, channel, pixel), count)
                : draw(buffers.noise, s, n, channel * s.pixels + pixel, count);
        if (s.learned) {
            const int64_t where = at(s.out, n, s.channels + channel, pixel);
            add_learned_noise(result, read(buffers.v, s.out, s.dtype, where, count), noise, count, c);
        } else {
            add_noise(result, noise, count, fixed_sigma(c));
        }
    }
    if (s.cotangent.data != nullptr) {
        const float* cotangent =
            read(buffers.cotangent, s.cotangent, s.dtype, at(s.cotangent, n, channel, pixel), count);
        const float* through_network = read(buffers.through_network, s.through_network, s.dtype,
                                            at(s.through_network, n, channel, pixel), count);
        add_guidance(result, cotangent, through_network, count, c, weight);
    }
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
