#include <cuda_runtime.h>

#include <algorithm>

#include "../philox.h"
#include "philox_normal.cuh"

namespace sda::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = int64_t{1} << 32;  // the block is one word of the counter
constexpr int64_t kMaxGridY = 65535;

// One thread draws one Philox block and writes its four elements; 4 bytes are written per element and none
// read but the identities. `lanes` neighbouring threads take the same four inner positions of neighbouring
// outer ones, so that channels_last writes land side by side; it is 1 where a block may straddle two outer
// positions.
template <bool kVector>
__global__ void __launch_bounds__(kThreads)
    fill_normal(float* __restrict__ out, ImageLayout layout, int64_t blocks, int64_t lanes, uint64_t seed,
                const int64_t* __restrict__ identities, uint32_t step) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (thread >= blocks) return;
    int64_t block = thread;
    if (lanes > 1) block = thread % lanes * (layout.inner / 4) + thread / lanes;
    for (int64_t n = blockIdx.y; n < layout.images; n += gridDim.y) {
        const Normals normals =
            philox_normals(seed, static_cast<uint32_t>(block), step, static_cast<uint64_t>(identities[n]));
        float* image = out + n * layout.stride_image;
        if constexpr (kVector) {
            reinterpret_cast<float4*>(image)[block] =
                make_float4(normals.n0, normals.n1, normals.n2, normals.n3);
        } else {
            const float values[4] = {normals.n0, normals.n1, normals.n2, normals.n3};
            int64_t outer = 4 * block / layout.inner;
            int64_t inner = 4 * block % layout.inner;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                if (outer < layout.outer) {
                    image[outer * layout.stride_outer + inner * layout.stride_inner] = values[k];
                }
                if (++inner == layout.inner) {
                    inner = 0;
                    ++outer;
                }
            }
        }
    }
}

__global__ void __launch_bounds__(kThreads)
    fill_words(uint32_t* __restrict__ out, int64_t images, int64_t blocks, int64_t first_block, uint64_t seed,
               const int64_t* __restrict__ identities, uint32_t step) {
    const int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (b >= blocks) return;
    for (int64_t n = blockIdx.y; n < images; n += gridDim.y) {
        const Words w = philox4x32(seed, static_cast<uint32_t>(first_block + b), step,
                                   static_cast<uint64_t>(identities[n]));
        uint32_t* row = out + 4 * (n * blocks + b);
        row[0] = w.w0;
        row[1] = w.w1;
        row[2] = w.w2;
        row[3] = w.w3;
    }
}

dim3 grid_for(int64_t blocks, int64_t images) {
    return dim3(static_cast<unsigned>((blocks + kThreads - 1) / kThreads),
                static_cast<unsigned>(std::min(images, kMaxGridY)));
}

int launch_status() {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? kOk : kCudaErrorBase + static_cast<int>(error);
}

}  // namespace

int philox_normal(void* out, int dtype, const ImageLayout& layout, uint64_t seed, const int64_t* identities,
                  uint32_t step, void* stream) {
    if (dtype != kFloat32) return kBadDtype;
    if (!valid(layout)) return kBadArgument;
    const int64_t blocks = (layout.outer * layout.inner + 3) / 4;
    if (blocks > kMaxBlocks) return kBadArgument;
    if (blocks == 0 || layout.images == 0) return kOk;
    const bool vector = layout.outer == 1 && layout.stride_inner == 1 && layout.inner % 4 == 0 &&
                        layout.stride_image % 4 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
    const int64_t lanes = layout.inner % 4 == 0 ? layout.outer : 1;
    auto* kernel = vector ? fill_normal<true> : fill_normal<false>;
    kernel<<<grid_for(blocks, layout.images), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<float*>(out), layout, blocks, lanes, seed, identities, step);
    return launch_status();
}

int philox_words(uint32_t* out, int64_t images, int64_t blocks, int64_t first_block, uint64_t seed,
                 const int64_t* identities, uint32_t step, void* stream) {
    if (images < 0 || blocks < 0 || first_block < 0 || first_block + blocks > kMaxBlocks) return kBadArgument;
    if (blocks == 0 || images == 0) return kOk;
    fill_words<<<grid_for(blocks, images), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        out, images, blocks, first_block, seed, identities, step);
    return launch_status();
}

const char* error_string(int status) {
    return cudaGetErrorString(static_cast<cudaError_t>(status - kCudaErrorBase));
}

}  // namespace sda::cuda
