#include "to_uint8.h"

#include <algorithm>

#include "../half.h"
#include "../status.h"
#include "clones.h"
#include "parallel.h"
#include "rows.h"

namespace sda::cpu {
namespace {

constexpr int64_t kChunk = 1024;            // pixels at a time: what is read stays in the cache
constexpr int64_t kGrainElements = 262144;  // worth a thread

inline uint8_t quantised(float x, bool truncate) {
    const float level = truncate ? 127.5f * x + 128.0f : (x + 1.0f) * 0.5f * 255.0f + 0.5f;
    const float positive = level > 0.0f ? level : 0.0f;  // NaN, too
    return static_cast<uint8_t>(static_cast<int32_t>(positive < 255.0f ? positive : 255.0f));
}

template <class T>
inline __attribute__((always_inline)) void quantise_run(uint8_t* to, const T* from, int64_t count,
                                                        int64_t stride, bool truncate) {
    if (stride == 1 && truncate) {
        for (int64_t i = 0; i < count; ++i) to[i] = quantised(widen(from[i]), true);
    } else if (stride == 1) {
        for (int64_t i = 0; i < count; ++i) to[i] = quantised(widen(from[i]), false);
    } else {
        for (int64_t i = 0; i < count; ++i) to[i] = quantised(widen(from[i * stride]), truncate);
    }
}

SDA_CLONES void quantise_float32(uint8_t* to, const float* from, int64_t count, int64_t stride,
                                 bool truncate) {
    quantise_run(to, from, count, stride, truncate);
}

SDA_CLONES void quantise_bfloat16(uint8_t* to, const Bfloat16* from, int64_t count, int64_t stride,
                                  bool truncate) {
    quantise_run(to, from, count, stride, truncate);
}

SDA_CLONES void quantise_float16(uint8_t* to, const Float16* from, int64_t count, int64_t stride,
                                 bool truncate) {
    quantise_run(to, from, count, stride, truncate);
}

void quantise(uint8_t* to, const Pixels& x, int dtype, int64_t element, int64_t count, bool truncate) {
    if (dtype == kFloat32) {
        quantise_float32(to, static_cast<const float*>(x.data) + element, count, x.stride_pixel, truncate);
    } else if (dtype == kBfloat16) {
        quantise_bfloat16(to, static_cast<const Bfloat16*>(x.data) + element, count, x.stride_pixel,
                          truncate);
    } else {
        quantise_float16(to, static_cast<const Float16*>(x.data) + element, count, x.stride_pixel, truncate);
    }
}

SDA_CLONES void interleave3(uint8_t* __restrict__ to, const uint8_t* __restrict__ planes, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        to[3 * i] = planes[i];
        to[3 * i + 1] = planes[kChunk + i];
        to[3 * i + 2] = planes[2 * kChunk + i];
    }
}

}  // namespace

int to_uint8(uint8_t* out, const Pixels& x, int dtype, int64_t images, int64_t channels, int64_t pixels,
             bool truncate, int threads) {
    if (!known(dtype)) return kBadDtype;
    if (images < 0 || channels < 0 || pixels < 0) return kBadArgument;
    const int64_t chunks = (pixels + kChunk - 1) / kChunk;
    const int64_t grain = std::max<int64_t>(1, kGrainElements / (kChunk * std::max<int64_t>(1, channels)));
    parallel_for(images * chunks, grain, threads, [&](int64_t begin, int64_t end) {
        uint8_t planes[3 * kChunk];
        for (int64_t item = begin; item < end; ++item) {
            const int64_t n = item / chunks;
            const int64_t first = item % chunks * kChunk;
            const int64_t count = std::min(kChunk, pixels - first);
            uint8_t* to = out + (n * pixels + first) * channels;
            const int64_t element = n * x.stride_image + first * x.stride_pixel;
            if (x.stride_channel == 1 && x.stride_pixel == channels) {
                // Already in the order of the result: one run.
                const Pixels flat{x.data, x.stride_image, 1, 1};
                quantise(to, flat, dtype, element, count * channels, truncate);
                continue;
            }
            for (int64_t channel = 0; channel < channels; ++channel) {
                uint8_t* plane = planes + channel % 3 * kChunk;
                quantise(plane, x, dtype, element + channel * x.stride_channel, count, truncate);
                if (channels != 3) {
                    for (int64_t i = 0; i < count; ++i) to[i * channels + channel] = plane[i];
                }
            }
            if (channels == 3) interleave3(to, planes, count);
        }
    });
    return kOk;
}

}  // namespace sda::cpu
