#include <cuda_runtime.h>

#include <algorithm>

#include "../status.h"
#include "pack.cuh"
#include "reverse_step.cuh"

namespace sda::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxGridY = 65535;

// How the four elements of a thread lie: side by side in every tensor (kFlat), or anywhere.
enum Order { kFlat, kStrided };

// The elements of one thread, as channel and pixel. Where noise is drawn they are one Philox block, and
// `lanes` neighbouring threads take the same four pixels of neighbouring channels, so that channels_last
// accesses share their cache lines; lanes is 1 where a block may straddle two channels. Where it is given,
// neighbouring threads take neighbouring elements of channels_last.
struct Elements {
    int channel[4], pixel[4];
    bool inside[4];
};

__device__ __forceinline__ Elements elements_of(int thread, int first, int channels, int pixels, bool drawn) {
    Elements e;
    const int total = channels * pixels;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        if (drawn && pixels % 4 == 0) {
            e.channel[k] = thread % channels;
            e.pixel[k] = 4 * (thread / channels) + k;
            e.inside[k] = e.pixel[k] < pixels;
        } else if (drawn) {
            const int element = 4 * thread + k;
            e.channel[k] = element / pixels;
            e.pixel[k] = element % pixels;
            e.inside[k] = element < total;
        } else {
            const int element = 4 * first + k * kThreads + (thread - first);
            e.channel[k] = element % channels;
            e.pixel[k] = element / channels;
            e.inside[k] = element < total;
        }
    }
    return e;
}

template <class T, Order kOrder>
__device__ __forceinline__ void load(float* to, const Pixels& from, int64_t n, int64_t channel_offset,
                                     int thread, const Elements& e) {
    const T* image =
        static_cast<const T*>(from.data) + n * from.stride_image + channel_offset * from.stride_channel;
    if constexpr (kOrder == kFlat) {
        const Pack<T, 4> pack = reinterpret_cast<const Pack<T, 4>*>(image)[thread];
#pragma unroll
        for (int k = 0; k < 4; ++k) to[k] = widen(pack.values[k]);
    } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int64_t where = e.channel[k] * from.stride_channel + e.pixel[k] * from.stride_pixel;
            to[k] = e.inside[k] ? widen(image[where]) : 0.0f;
        }
    }
}

// One thread makes four elements of an image. Per element it reads x, eps and what else is given once and
// writes four bytes: with learned variance, given noise and guidance 12 bytes and 4 times the size of out's
// dtype (T; U is that of through_network). The result may lie where x does, hence no __restrict__: a thread
// reads its elements before it writes them.
template <class T, class U, Order kOrder>
__global__ void __launch_bounds__(kThreads) step(ReverseStep s) {
    const int channels = static_cast<int>(s.channels);
    const int pixels = static_cast<int>(s.pixels);
    const int first = static_cast<int>(blockIdx.x) * kThreads;
    const int thread = first + static_cast<int>(threadIdx.x);
    if (kOrder == kFlat && 4 * thread >= channels * pixels) return;
    const bool drawn = s.noise.data == nullptr;
    const bool guided = s.cotangent.data != nullptr;
    const Coefficients c = coefficients(s);
    Elements e;
    if constexpr (kOrder == kStrided) e = elements_of(thread, first, channels, pixels, drawn);
    for (int64_t n = blockIdx.y; n < s.images; n += gridDim.y) {
        float x[4], eps[4], v[4], noise[4], cotangent[4], through_network[4];
        load<float, kOrder>(x, s.x, n, 0, thread, e);
        load<T, kOrder>(eps, s.out, n, 0, thread, e);
        if (s.learned) load<T, kOrder>(v, s.out, n, channels, thread, e);
        if (guided) {
            load<T, kOrder>(cotangent, s.cotangent, n, 0, thread, e);
            load<U, kOrder>(through_network, s.through_network, n, 0, thread, e);
        }
        if (!drawn) {
            load<float, kOrder>(noise, s.noise, n, 0, thread, e);
        } else {
            int block = thread;
            if constexpr (kOrder == kStrided) block = (e.channel[0] * pixels + e.pixel[0]) / 4;
            const Normals normals =
                philox_normals(s.seed, static_cast<uint32_t>(block), static_cast<uint32_t>(s.position[1]),
                               static_cast<uint64_t>(s.identities[n]));
            noise[0] = normals.n0;
            noise[1] = normals.n1;
            noise[2] = normals.n2;
            noise[3] = normals.n3;
        }
        const float weight = guided ? guidance_weight(s, n) : 0.0f;
        const float fixed = s.learned ? 0.0f : fixed_sigma(c);
        Pack<float, 4> result;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            float y = posterior_mean(c, s.clip, x[k], eps[k]);
            if (c.noise_scale != 0.0f) {
                const float sigma = s.learned ? learned_sigma(c, v[k]) : fixed;
                y = add(y, mul(sigma, noise[k]));
            }
            if (guided) y = add(y, mul(weight, gradient(c, cotangent[k], through_network[k])));
            result.values[k] = y;
        }
        float* image = static_cast<float*>(s.result.data) + n * s.result.stride_image;
        if constexpr (kOrder == kFlat) {
            reinterpret_cast<Pack<float, 4>*>(image)[thread] = result;
        } else {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                if (e.inside[k]) {
                    image[e.channel[k] * s.result.stride_channel + e.pixel[k] * s.result.stride_pixel] =
                        result.values[k];
                }
            }
        }
    }
}

// Whether every image is contiguous and four elements of it can be taken at once.
bool flat(const Pixels& tensor, int64_t pixels, int64_t size) {
    return tensor.data == nullptr ||
           (tensor.stride_pixel == 1 && tensor.stride_channel == pixels && tensor.stride_image % 4 == 0 &&
            reinterpret_cast<uintptr_t>(tensor.data) % (4 * size) == 0);
}

template <class T, class U>
void launch(const ReverseStep& s, bool vectors, cudaStream_t stream) {
    const int64_t threads = (s.channels * s.pixels + 3) / 4;
    const dim3 grid(static_cast<unsigned>((threads + kThreads - 1) / kThreads),
                    static_cast<unsigned>(std::min(s.images, kMaxGridY)));
    auto* kernel = vectors ? step<T, U, kFlat> : step<T, U, kStrided>;
    kernel<<<grid, kThreads, 0, stream>>>(s);
}

}  // namespace

int reverse_step(const ReverseStep& s, void* stream) {
    if (s.dtype != kFloat32 && s.dtype != kBfloat16 && s.dtype != kFloat16) return kBadDtype;
    if (!valid(s)) return kBadArgument;
    if (s.images == 0 || s.channels == 0 || s.pixels == 0) return kOk;
    const int64_t size = s.dtype == kFloat32 ? 4 : 2;
    const bool wide = s.through_network_dtype == kFloat32;
    const bool vectors = s.channels * s.pixels % 4 == 0 && flat(s.x, s.pixels, 4) &&
                         flat(s.out, s.pixels, size) && flat(s.noise, s.pixels, 4) &&
                         flat(s.cotangent, s.pixels, size) &&
                         flat(s.through_network, s.pixels, wide ? 4 : size) && flat(s.result, s.pixels, 4);
    const auto where = static_cast<cudaStream_t>(stream);
    if (s.dtype == kFloat32) {
        launch<float, float>(s, vectors, where);
    } else if (s.dtype == kBfloat16) {
        (wide ? launch<Bfloat16, float> : launch<Bfloat16, Bfloat16>)(s, vectors, where);
    } else {
        (wide ? launch<Float16, float> : launch<Float16, Float16>)(s, vectors, where);
    }
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? kOk : kCudaErrorBase + static_cast<int>(error);
}

}  // namespace sda::cuda
