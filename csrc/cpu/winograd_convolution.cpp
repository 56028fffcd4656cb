#include "winograd_convolution.h"

#include <algorithm>
#include <atomic>

#include "clones.h"
#include "parallel.h"

#if defined(__x86_64__) && defined(__GNUC__) && (defined(__clang__) || __GNUC__ >= 11)
#include <immintrin.h>
#define SDA_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC's own header of these instructions
#endif

namespace sda::cpu {
namespace {

constexpr int64_t kLanes = 16;    // of a vector of float32
constexpr int64_t kColumns = 64;  // kernels that are computed at once: four vectors of sums ...
constexpr int64_t kTiles = 6;     // ... for each of so many tiles, which fill the registers
constexpr int64_t kFrequencies = 16;
constexpr int64_t kCache = 448 << 10;  // bytes of transformed pixels, which stay in the second cache

// Tiles that a thread transforms at once, a multiple of kTiles.
int64_t block_tiles(const WinogradConvolution& c) {
    const int64_t tile = kFrequencies * c.channels * static_cast<int64_t>(sizeof(uint16_t));
    return std::clamp<int64_t>(kCache / tile, kTiles, 16 * kTiles) / kTiles * kTiles;
}

int64_t pixel_bytes(const WinogradConvolution& c) {
    return kFrequencies * block_tiles(c) * c.channels * static_cast<int64_t>(sizeof(uint16_t));
}

int64_t scratch_bytes(const WinogradConvolution& c) {
    return pixel_bytes(c) + kFrequencies * block_tiles(c) * kColumns * static_cast<int64_t>(sizeof(float));
}

int64_t all_tiles(const WinogradConvolution& c) { return (c.height / 2) * (c.width / 2); }

int64_t all_blocks(const WinogradConvolution& c) {
    return c.images * ((all_tiles(c) + block_tiles(c) - 1) / block_tiles(c));
}

int64_t crew(const WinogradConvolution& c, int threads) {
    return std::max<int64_t>(1, std::min<int64_t>(all_blocks(c), threads));
}

bool valid(const WinogradConvolution& c) {
    return c.images >= 0 && c.height >= 0 && c.width >= 0 && c.channels > 0 && c.kernels > 0 &&
           c.height % 2 == 0 && c.width % 2 == 0 && c.channels % kLanes == 0 && c.kernels % kColumns == 0;
}

#if defined(SDA_AVX512_BF16)

SDA_AVX512_BF16 SDA_INLINE __m512 load(const uint16_t* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

SDA_AVX512_BF16 SDA_INLINE void store(uint16_t* to, __m512 value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(value));
}

// B^T d, of the four numbers d.
SDA_AVX512_BF16 SDA_INLINE void from_pixels(__m512 d0, __m512 d1, __m512 d2, __m512 d3, __m512* to,
                                            int pitch) {
    to[0] = _mm512_sub_ps(d0, d2);
    to[pitch] = _mm512_add_ps(d1, d2);
    to[2 * pitch] = _mm512_sub_ps(d2, d1);
    to[3 * pitch] = _mm512_sub_ps(d1, d3);
}

// A^T m, of the four numbers m.
SDA_AVX512_BF16 SDA_INLINE void to_pixels(__m512 m0, __m512 m1, __m512 m2, __m512 m3, __m512* first,
                                          __m512* second) {
    *first = _mm512_add_ps(_mm512_add_ps(m0, m1), m2);
    *second = _mm512_sub_ps(_mm512_sub_ps(m1, m2), m3);
}

// B^T d B of `tiles` tiles from `first` on, to v [16, block_tiles, channels].
SDA_AVX512_BF16 void transform_pixels(const WinogradConvolution& c, const uint16_t* image, int64_t first,
                                      int64_t tiles, uint16_t* v) {
    const int64_t across = c.width / 2, plane = block_tiles(c) * c.channels;
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t row = 2 * ((first + tile) / across) - 1, column = 2 * ((first + tile) % across) - 1;
        const uint16_t* pixels[16];
        for (int64_t i = 0; i < 16; ++i) {
            const int64_t y = row + i / 4, x = column + i % 4;
            const bool inside = y >= 0 && y < c.height && x >= 0 && x < c.width;
            pixels[i] = inside ? image + y * c.x_stride_row + x * c.x_stride_pixel : nullptr;
        }
        for (int64_t channel = 0; channel < c.channels; channel += kLanes) {
            __m512 d[16], rows[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) d[i] = pixels[i] ? load(pixels[i] + channel) : _mm512_setzero_ps();
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) from_pixels(d[j], d[4 + j], d[8 + j], d[12 + j], rows + j, 4);
            uint16_t* to = v + tile * c.channels + channel;
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                __m512 columns[4];
                from_pixels(rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3], columns, 1);
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) store(to + (4 * i + j) * plane, columns[j]);
            }
        }
    }
}

// m [Tiles, 64] = v [Tiles, channels] times u [channels / 2, 64, 2].
template <int Tiles>
SDA_AVX512_BF16 void multiply(const uint16_t* v, const uint16_t* u, int64_t channels, float* m) {
    __m512 sums[Tiles][4];
#pragma GCC unroll 6
    for (int tile = 0; tile < Tiles; ++tile) {
        for (int n = 0; n < 4; ++n) sums[tile][n] = _mm512_setzero_ps();
    }
    for (int64_t channel = 0; channel < channels; channel += 2, u += 2 * kColumns) {
        __m512bh weights[4];
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) weights[n] = (__m512bh)_mm512_loadu_si512(u + 2 * kLanes * n);
#pragma GCC unroll 6
        for (int tile = 0; tile < Tiles; ++tile) {
            int32_t pair;
            __builtin_memcpy(&pair, v + tile * channels + channel, sizeof pair);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int n = 0; n < 4; ++n) sums[tile][n] = _mm512_dpbf16_ps(sums[tile][n], both, weights[n]);
        }
    }
#pragma GCC unroll 6
    for (int tile = 0; tile < Tiles; ++tile) {
        for (int n = 0; n < 4; ++n) _mm512_storeu_ps(m + tile * kColumns + n * kLanes, sums[tile][n]);
    }
}

// The same for any number of tiles. A tile's sums do not depend on which ones it is computed with.
void multiply_all(const uint16_t* v, const uint16_t* u, int64_t channels, int64_t tiles, float* m) {
    for (; tiles >= kTiles; tiles -= kTiles, v += kTiles * channels, m += kTiles * kColumns) {
        multiply<kTiles>(v, u, channels, m);
    }
    switch (tiles) {
        case 5:
            multiply<5>(v, u, channels, m);
            break;
        case 4:
            multiply<4>(v, u, channels, m);
            break;
        case 3:
            multiply<3>(v, u, channels, m);
            break;
        case 2:
            multiply<2>(v, u, channels, m);
            break;
        case 1:
            multiply<1>(v, u, channels, m);
            break;
    }
}

// A^T m A + bias of `tiles` tiles from `first` on, for 64 kernels; m is [16, block_tiles, 64].
SDA_AVX512_BF16 void transform_sums(const WinogradConvolution& c, const float* m, int64_t first,
                                    int64_t tiles, const float* bias, uint16_t* image) {
    const int64_t across = c.width / 2, plane = block_tiles(c) * kColumns;
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t row = 2 * ((first + tile) / across), column = 2 * ((first + tile) % across);
        uint16_t* pixel = image + (row * c.width + column) * c.kernels;
        for (int64_t kernel = 0; kernel < kColumns; kernel += kLanes) {
            const float* from = m + tile * kColumns + kernel;
            __m512 upper[4], lower[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                const float* f = from + j * plane;
                to_pixels(_mm512_loadu_ps(f), _mm512_loadu_ps(f + 4 * plane), _mm512_loadu_ps(f + 8 * plane),
                          _mm512_loadu_ps(f + 12 * plane), upper + j, lower + j);
            }
            const __m512 offset = bias ? _mm512_loadu_ps(bias + kernel) : _mm512_setzero_ps();
            __m512 left, right;
            to_pixels(upper[0], upper[1], upper[2], upper[3], &left, &right);
            store(pixel + kernel, _mm512_add_ps(left, offset));
            store(pixel + c.kernels + kernel, _mm512_add_ps(right, offset));
            to_pixels(lower[0], lower[1], lower[2], lower[3], &left, &right);
            store(pixel + c.width * c.kernels + kernel, _mm512_add_ps(left, offset));
            store(pixel + (c.width + 1) * c.kernels + kernel, _mm512_add_ps(right, offset));
        }
    }
}

void convolve_block(const WinogradConvolution& c, int64_t block, uint16_t* v, float* m) {
    const int64_t size = block_tiles(c), blocks = all_blocks(c) / c.images;
    const int64_t image = block / blocks, first = block % blocks * size;
    const int64_t tiles = std::min(size, all_tiles(c) - first);
    transform_pixels(c, static_cast<const uint16_t*>(c.x) + image * c.x_stride_image, first, tiles, v);
    for (int64_t kernel = 0; kernel < c.kernels; kernel += kColumns) {
        const uint16_t* u = static_cast<const uint16_t*>(c.packed) + kernel * kFrequencies * c.channels;
        for (int64_t f = 0; f < kFrequencies; ++f) {
            multiply_all(v + f * size * c.channels, u + f * c.channels * kColumns, c.channels, tiles,
                         m + f * size * kColumns);
        }
        uint16_t* y = static_cast<uint16_t*>(c.y) + image * c.height * c.width * c.kernels + kernel;
        transform_sums(c, m, first, tiles, c.bias ? c.bias + kernel : nullptr, y);
    }
}

#else

void convolve_block(const WinogradConvolution&, int64_t, uint16_t*, float*) {}

#endif

}  // namespace

bool winograd_convolution_runs() {
#if defined(SDA_AVX512_BF16)
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

int64_t winograd_convolution_workspace(const WinogradConvolution& c, int threads) {
    return valid(c) ? crew(c, threads) * scratch_bytes(c) : 0;
}

int winograd_convolution(const WinogradConvolution& c, void* workspace, int threads) {
    if (!valid(c) || !winograd_convolution_runs()) return kBadArgument;
    const int64_t blocks = all_blocks(c), slots = crew(c, threads);
    std::atomic<int64_t> next{0};
    for_tasks(slots, slots, [&](int64_t slot) {
        char* scratch = static_cast<char*>(workspace) + slot * scratch_bytes(c);
        auto* v = reinterpret_cast<uint16_t*>(scratch);
        auto* m = reinterpret_cast<float*>(scratch + pixel_bytes(c));
        for (int64_t block = next++; block < blocks; block = next++) convolve_block(c, block, v, m);
    });
    return kOk;
}

}  // namespace sda::cpu
