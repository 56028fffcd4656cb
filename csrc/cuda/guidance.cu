#include <cuda_runtime.h>

#include <algorithm>

#include "guidance.cuh"
#include "guidance_plan.h"
#include "pack.cuh"

// Two launches. `reduce_rows` reads x and eps once, a tile of groups of rows to a block; it writes what the
// tile contributes to P x0 P^T, and the clamp mask, four rows to a byte. `spread_rows` sums what the tiles
// gave, filters the few low rows it needs in shared memory and writes its tile of the cotangent. On the side
// that moves, per element, 1/2 byte for the mask and about 8 / D^2 for the low rows, through the second
// cache.
//
// The columns of a row are those of one channel or, in channels_last, of all channels, interleaved: `lanes`.

namespace sda::cuda {
namespace {

constexpr int kMaxThreads = 256;

// -- On the device -----------------------------------------------------------------------------------------

// P[r, h], zero where there is none.
__device__ float down_weight(const float* down, const Plan& p, int r, int h) {
    return r >= 0 && r < p.low && h >= 0 && h < p.size ? down[r * p.size + h] : 0.0f;
}

// Which tile a block works on, and its groups [first, last).
struct Tile {
    int64_t image, plane;
    int channel, index, first, last;

    __device__ explicit Tile(const Plan& p)
        : image(blockIdx.x / p.tiles / p.planes),
          plane(blockIdx.x / p.tiles),
          channel(blockIdx.x / p.tiles % p.planes),
          index(blockIdx.x % p.tiles),
          first(1 + index * p.groups),
          last(min(first + p.groups, p.low + 2)) {}

    // The weights of rows q, q - 1, q - 2, q - 3 of P for every row of every group q.
    __device__ void fill_taps(float4* taps, const float* down, const Plan& p) const {
        for (int i = threadIdx.x; i < (last - first) * p.factor; i += blockDim.x) {
            const int q = first + i / p.factor;
            const int h = first * p.factor + i - static_cast<int>(lead(p.factor));
            taps[i] = make_float4(down_weight(down, p, q, h), down_weight(down, p, q - 1, h),
                                  down_weight(down, p, q - 2, h), down_weight(down, p, q - 3, h));
        }
    }
};

// kCount columns of one group: their x0 weighted into sums[i] for the rows q - i of P x0, and their mask.
template <class Eps, int kCount>
__device__ void reduce_group(const GuidanceTensors& t, const Plan& p, const Tile& tile, int q, int column,
                             float a, float b, const float4* taps, float (&sums)[4][kCount]) {
    const int w = column / p.lanes, c = tile.channel + column % p.lanes;
    const ImageStrides &xs = t.x_strides, &es = t.out_strides, &zs = t.x0_strides;
    const float* x = t.x + tile.image * xs.image + c * xs.channel + w * xs.column;
    const Eps* eps = static_cast<const Eps*>(t.out) + tile.image * es.image + c * es.channel + w * es.column;
    const int64_t o_x0 = tile.image * zs.image + c * zs.channel + w * zs.column;
    const int h_first = q * p.factor - static_cast<int>(lead(p.factor));
    const int h_last = min(h_first + p.factor, p.size);
    for (int quad = 0; quad < p.quads; ++quad) {
        float b_x[4][kCount], b_eps[4][kCount];
        uint8_t bits[kCount] = {};
#pragma unroll
        for (int u = 0; u < 4; ++u) {
            const int h = h_first + 4 * quad + u;
#pragma unroll
            for (int v = 0; v < kCount; ++v) b_x[u][v] = b_eps[u][v] = 0.0f;
            if (h >= 0 && h < h_last) {
                load(b_x[u], x + h * xs.row);
                load(b_eps[u], eps + h * es.row);
            }
        }
#pragma unroll
        for (int u = 0; u < 4; ++u) {
            const int h = h_first + 4 * quad + u;
            if (h < 0 || h >= h_last) continue;
            const float4 tap = taps[(q - tile.first) * p.factor + 4 * quad + u];
            float x0[kCount];
#pragma unroll
            for (int v = 0; v < kCount; ++v) {
                const float raw = predict_raw(a, b, b_x[u][v], b_eps[u][v]);
                x0[v] = clamp_unit(raw);
                bits[v] = static_cast<uint8_t>(bits[v] | (x0[v] == raw) << u);
                sums[0][v] += tap.x * x0[v];
                sums[1][v] += tap.y * x0[v];
                sums[2][v] += tap.z * x0[v];
                sums[3][v] += tap.w * x0[v];
            }
            if (t.x0 != nullptr) store(t.x0 + o_x0 + h * zs.row, x0);
        }
        Pack<uint8_t, kCount> pack;
#pragma unroll
        for (int v = 0; v < kCount; ++v) pack.values[v] = bits[v];
        const int64_t row = (tile.plane * (p.low + 2) + q) * p.quads + quad;
        *reinterpret_cast<Pack<uint8_t, kCount>*>(p.mask + row * p.width + column) = pack;
    }
}

// sums[r][j] = rows[r] P^T at column j, for four rows at a time so that a weight is read once. Columns apart
// by D lie side by side in a row: [phase k][q] is column D q + k - lead.
__device__ void contract(float* sums, const float* rows, const float* weights, int row_count, const Plan& p) {
    const int row_pitch = p.factor * p.pitch;
    const int blocks = (row_count + 3) / 4;
    for (int i = threadIdx.x; i < blocks * p.narrow; i += blockDim.x) {
        const int r = i / p.narrow * 4, j = i % p.narrow;
        float sum[4] = {};
        for (int step = 0; step < 4; ++step) {
            for (int k = 0; k < p.factor; ++k) {
                const float weight = weights[(step * p.factor + k) * p.low + j / p.lanes];
                const float* from = rows + r * row_pitch + k * p.pitch + j + step * p.lanes;
#pragma unroll
                for (int u = 0; u < 4; ++u) {
                    if (r + u < row_count) sum[u] += weight * from[u * row_pitch];
                }
            }
        }
#pragma unroll
        for (int u = 0; u < 4; ++u) {
            if (r + u < row_count) sums[(r + u) * p.narrow + j] = sum[u];
        }
    }
}

template <class Eps, int kCount>
__global__ void __launch_bounds__(kMaxThreads) reduce_rows(GuidanceTensors t, Plan p) {
    extern __shared__ float4 shared[];
    const Tile tile(p);
    float4* taps = shared;
    float* weights = reinterpret_cast<float*>(taps + p.groups * p.factor);  // [4D, m]: P along a row
    float* rows = weights + 4 * p.size;                                     // [groups + 3, D, pitch]
    const int start = static_cast<int>(lead(p.factor));
    const int row_count = tile.last - tile.first + 3;
    const int row_pitch = p.factor * p.pitch;
    if (tile.channel == 0 && tile.index == 0 && threadIdx.x == 0) p.arrived[tile.image] = 0;
    tile.fill_taps(taps, t.down, p);
    for (int i = threadIdx.x; i < 4 * p.size; i += blockDim.x) {
        const int r = i / (4 * p.factor), tap = i % (4 * p.factor);
        weights[tap * p.low + r] = down_weight(t.down, p, r, p.factor * r + tap - start);
    }
    for (int i = threadIdx.x; i < row_count * row_pitch; i += blockDim.x) rows[i] = 0.0f;
    __syncthreads();

    const auto [a, b] = prediction_of(t);
    for (int column = threadIdx.x * kCount; column < p.width; column += blockDim.x * kCount) {
        int place[kCount];
#pragma unroll
        for (int v = 0; v < kCount; ++v) {
            const int s = (column + v) / p.lanes + start;
            place[v] = s % p.factor * p.pitch + s / p.factor * p.lanes + (column + v) % p.lanes;
        }
        float one[kCount] = {}, two[kCount] = {}, three[kCount] = {};  // begun rows of P x0
        for (int q = tile.first; q < tile.last + 3; ++q) {
            float sums[4][kCount] = {};
            if (q < tile.last) reduce_group<Eps, kCount>(t, p, tile, q, column, a, b, taps, sums);
#pragma unroll
            for (int v = 0; v < kCount; ++v) {
                rows[(q - tile.first) * row_pitch + place[v]] = three[v] + sums[3][v];
                three[v] = two[v] + sums[2][v];
                two[v] = one[v] + sums[1][v];
                one[v] = sums[0][v];
            }
        }
    }
    __syncthreads();
    contract(p.sums + (tile.plane * p.tiles + tile.index) * (p.groups + 3) * p.narrow, rows, weights,
             row_count, p);
}

// low[r, j]: the reference minus what the tiles that row r of P meets have summed.
__device__ float low_at(const GuidanceTensors& t, const Plan& p, const Tile& tile, int r, int j) {
    if (r < 0 || r >= p.low) return 0.0f;
    const int first = (max(r, 1) - 1) / p.groups, last = (min(r + 3, p.low + 1) - 1) / p.groups;
    float sum = 0.0f;
    for (int i = first; i <= last; ++i) {
        const int row = r + 2 - i * p.groups;
        sum += p.sums[((tile.plane * p.tiles + i) * (p.groups + 3) + row) * p.narrow + j];
    }
    const int64_t channel = tile.image * t.channels + tile.channel + j % p.lanes;
    return t.reference_down[(channel * p.low + r) * p.low + j / p.lanes] - sum;
}

// The rows first - 6 .. last + 2 of low, then first - 3 .. last - 1 of smooth in their place. Returns this
// thread's share of <low, smooth> over the rows first - 1 .. last - 2, which are the tile's own.
__device__ float filter(const GuidanceTensors& t, const Plan& p, const Tile& tile, float* low,
                        float* across) {
    constexpr int kReach = static_cast<int>(kGramReach);
    const int top = tile.first - 2 * kReach;
    const int row_count = tile.last - tile.first + 3 * kReach;
    for (int i = threadIdx.x; i < row_count * p.narrow; i += blockDim.x) {
        low[i] = low_at(t, p, tile, top + i / p.narrow, i % p.narrow);
    }
    __syncthreads();
    for (int j = threadIdx.x; j < p.narrow; j += blockDim.x) {
        const int w = j / p.lanes;
        float weights[2 * kReach + 1];
        int offsets[2 * kReach + 1];
#pragma unroll
        for (int s = 0; s <= 2 * kReach; ++s) {
            const int column = w + s - kReach;
            const bool exists = column >= 0 && column < p.low;
            weights[s] = exists ? t.gram[w * p.low + column] : 0.0f;
            offsets[s] = exists ? j + (s - kReach) * p.lanes : j;
        }
        for (int i = 0; i < row_count; ++i) {
            float sum = 0.0f;
#pragma unroll
            for (int s = 0; s <= 2 * kReach; ++s) sum += weights[s] * low[i * p.narrow + offsets[s]];
            across[i * p.narrow + j] = sum;
        }
    }
    __syncthreads();
    float share = 0.0f;
    for (int i = threadIdx.x; i < (row_count - 2 * kReach) * p.narrow; i += blockDim.x) {
        const int at = i + kReach * p.narrow, r = top + at / p.narrow;
        float sum = 0.0f;
        if (r >= 0 && r < p.low) {
            for (int s = -kReach; s <= kReach; ++s) {
                if (r + s < 0 || r + s >= p.low) continue;
                sum += t.gram[r * p.low + r + s] * across[at + s * p.narrow];
            }
        }
        if (r >= tile.first - 1 && r < tile.last - 1) share += low[at] * sum;
        low[at] = sum;
    }
    return share;
}

// The sum of a block's values in a fixed order; whole in thread 0. Ends with the block in step.
__device__ float block_sum(float value) {
    __shared__ float values[kMaxThreads];
    values[threadIdx.x] = value;
    for (int i = threadIdx.x + blockDim.x; i < kMaxThreads; i += blockDim.x) values[i] = 0.0f;
    for (int half = kMaxThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        for (int i = threadIdx.x; i < half; i += blockDim.x) values[i] += values[i + half];
    }
    __syncthreads();
    return values[0];
}

// The block that comes last sums the parts of an image, always in the same order.
__device__ void finish_squares(const GuidanceTensors& t, const Plan& p, const Tile& tile, float part) {
    if (threadIdx.x != 0) return;
    const unsigned count = static_cast<unsigned>(p.planes * p.tiles);
    p.parts[tile.plane * p.tiles + tile.index] = part;
    __threadfence();
    if (atomicAdd(&p.arrived[tile.image], 1u) != count - 1) return;
    __threadfence();
    float sum = 0.0f;
    for (unsigned i = 0; i < count; ++i) sum += __ldcg(p.parts + tile.image * count + i);
    t.squares[tile.image] = sum;
}

template <class Out, int kCount>
__global__ void __launch_bounds__(kMaxThreads) spread_rows(GuidanceTensors t, Plan p) {
    extern __shared__ float4 shared[];
    const Tile tile(p);
    const int start = static_cast<int>(lead(p.factor));
    float4* taps = shared;
    float* low = reinterpret_cast<float*>(taps + p.groups * p.factor);
    float* across = low + (p.groups + 9) * p.narrow;
    tile.fill_taps(taps, t.down, p);
    finish_squares(t, p, tile, block_sum(filter(t, p, tile, low, across)));

    // A plane of cotangent has columns of one channel, wherever they lie, or all of the image's.
    const bool apart = t.interleaved && p.lanes == 1;
    const int64_t step = apart ? t.channels : 1;
    const int64_t plane = int64_t{p.size} * p.size;
    const int64_t o_plane = tile.image * t.channels * plane + tile.channel * (apart ? 1 : plane);
    const float* smooth = low + static_cast<int>(kGramReach) * p.narrow;  // row first - 3
    for (int column = threadIdx.x * kCount; column < p.width; column += blockDim.x * kCount) {
        Out* to = static_cast<Out*>(t.cotangent) + o_plane + column * step;
        float weights[4][kCount];
        int offsets[4][kCount];
#pragma unroll
        for (int v = 0; v < kCount; ++v) {
            const int w = (column + v) / p.lanes, last = (w + start) / p.factor;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = last - 3 + i;
                weights[i][v] = down_weight(t.down, p, row, w);
                offsets[i][v] = min(max(row, 0), p.low - 1) * p.lanes + (column + v) % p.lanes;
            }
        }
        float rows[4][kCount];  // of smooth P: q - 3 .. q
        for (int q = tile.first - 3; q < tile.last; ++q) {
            const float* from = smooth + (q - tile.first + 3) * p.narrow;
#pragma unroll
            for (int v = 0; v < kCount; ++v) {
                rows[0][v] = rows[1][v];
                rows[1][v] = rows[2][v];
                rows[2][v] = rows[3][v];
                rows[3][v] = weights[0][v] * from[offsets[0][v]] + weights[1][v] * from[offsets[1][v]] +
                             weights[2][v] * from[offsets[2][v]] + weights[3][v] * from[offsets[3][v]];
            }
            if (q < tile.first) continue;
            const int h_first = q * p.factor - start, h_last = min(h_first + p.factor, p.size);
            for (int quad = 0; quad < p.quads; ++quad) {
                const int64_t mask_row = (tile.plane * (p.low + 2) + q) * p.quads + quad;
                const auto bits =
                    *reinterpret_cast<const Pack<uint8_t, kCount>*>(p.mask + mask_row * p.width + column);
#pragma unroll
                for (int u = 0; u < 4; ++u) {
                    const int h = h_first + 4 * quad + u;
                    if (h < 0 || h >= h_last) continue;
                    const float4 tap = taps[(q - tile.first) * p.factor + 4 * quad + u];
                    float sum[kCount];
#pragma unroll
                    for (int v = 0; v < kCount; ++v) {
                        sum[v] =
                            tap.w * rows[0][v] + tap.z * rows[1][v] + tap.y * rows[2][v] + tap.x * rows[3][v];
                        if (!(bits.values[v] >> u & 1)) sum[v] = 0.0f;
                    }
                    store(to + h * step * p.width, sum);
                }
            }
        }
    }
}

// -- On the host -------------------------------------------------------------------------------------------

bool aligned(const void* data, int64_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

// Four columns of a row at a time: they lie side by side, and every row begins at a multiple of four.
bool by_fours(const void* data, int64_t element_bytes, const ImageStrides& s, const Plan& p) {
    const bool side_by_side = s.column == p.lanes && (p.lanes == 1 || s.channel == 1);
    const bool channels = p.lanes > 1 || s.channel % 4 == 0;
    return side_by_side && channels && s.image % 4 == 0 && s.row % 4 == 0 && aligned(data, 4 * element_bytes);
}

template <class Kernel>
int launch(Kernel kernel, int64_t blocks, int threads, int64_t shared, cudaStream_t stream,
           const GuidanceTensors& t, const Plan& p) {
    if (shared > kFreeShared) {
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       static_cast<int>(shared));
        if (error != cudaSuccess) return kCudaErrorBase + static_cast<int>(error);
    }
    kernel<<<static_cast<unsigned>(blocks), threads, static_cast<size_t>(shared), stream>>>(t, p);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? kOk : kCudaErrorBase + static_cast<int>(error);
}

int threads_for(int width, int count) {
    return static_cast<int>(std::min<int64_t>(kMaxThreads, round_up((width + count - 1) / count, 32)));
}

template <class T>
int run(const GuidanceTensors& t, const Plan& p, cudaStream_t stream) {
    const int64_t blocks = t.images * p.planes * p.tiles;
    const bool fours = p.width % 4 == 0;
    const bool reads = fours && by_fours(t.x, 4, t.x_strides, p) &&
                       by_fours(t.out, sizeof(T), t.out_strides, p) &&
                       (t.x0 == nullptr || by_fours(t.x0, 4, t.x0_strides, p));
    const bool writes = fours && aligned(t.cotangent, 4 * sizeof(T)) && !(t.interleaved && p.lanes == 1);
    const int status = launch(reads ? reduce_rows<T, 4> : reduce_rows<T, 1>, blocks,
                              threads_for(p.width, reads ? 4 : 1), reduce_shared(p), stream, t, p);
    if (status != kOk) return status;
    return launch(writes ? spread_rows<T, 4> : spread_rows<T, 1>, blocks,
                  threads_for(p.width, writes ? 4 : 1), spread_shared(p), stream, t, p);
}

}  // namespace

int64_t guidance_workspace(const GuidanceTensors& t) {
    if (!guidance_fits(t)) return 0;
    Plan p = plan_for(t);
    return carve(t, p, nullptr);
}

int guidance(const GuidanceTensors& t, void* workspace, void* stream) {
    if (!guidance_fits(t)) return kBadArgument;
    Plan p = plan_for(t);
    if (t.images * p.planes * p.tiles > INT32_MAX) return kBadArgument;
    if (t.images == 0) return kOk;
    carve(t, p, static_cast<char*>(workspace));
    switch (t.dtype) {
        case kFloat32:
            return run<float>(t, p, static_cast<cudaStream_t>(stream));
        case kBfloat16:
            return run<Bfloat16>(t, p, static_cast<cudaStream_t>(stream));
        case kFloat16:
            return run<Float16>(t, p, static_cast<cudaStream_t>(stream));
        default:
            return kBadDtype;
    }
}

}  // namespace sda::cuda
