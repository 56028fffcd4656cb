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

constexpr int64_t kLanes = 16;  // of a vector of float32
constexpr int64_t kSums = 24;   // vectors of sums that the registers hold
constexpr int64_t kFrequencies = 16;
constexpr int64_t kCache = 448 << 10;  // bytes of transformed pixels, which stay in the second cache
constexpr int64_t kBlock = 96;         // tiles at most that a thread transforms at once

// Tiles that a thread transforms at once, a multiple of those whose sums the registers hold.
int64_t block_tiles(const WinogradConvolution& c) {
    const int64_t tile = kFrequencies * c.channels * static_cast<int64_t>(sizeof(uint16_t));
    const int64_t held = kSums * kLanes / c.columns;
    return std::clamp<int64_t>(kCache / tile, held, kBlock) / held * held;
}

// From one frequency's transformed pixels or sums to the next's, a cache line more than they take: at whole
// pages from each other the frequencies of a tile would fall on the same few lines of the first cache.
int64_t pixel_plane(const WinogradConvolution& c) { return block_tiles(c) * c.channels + 32; }
int64_t sum_plane(const WinogradConvolution& c) { return block_tiles(c) * c.columns + 16; }

int64_t pixel_bytes(const WinogradConvolution& c) {
    return kFrequencies * pixel_plane(c) * static_cast<int64_t>(sizeof(uint16_t));
}

int64_t scratch_bytes(const WinogradConvolution& c) {
    return pixel_bytes(c) + kFrequencies * sum_plane(c) * static_cast<int64_t>(sizeof(float));
}

// Of all images: a block may hold the end of one and the beginning of the next.
int64_t all_tiles(const WinogradConvolution& c) { return c.images * (c.height / 2) * (c.width / 2); }

int64_t all_blocks(const WinogradConvolution& c) {
    return (all_tiles(c) + block_tiles(c) - 1) / block_tiles(c);
}

int64_t crew(const WinogradConvolution& c, int threads) {
    return std::max<int64_t>(1, std::min<int64_t>(all_blocks(c), threads));
}

bool valid(const WinogradConvolution& c) {
    return c.images >= 0 && c.height >= 0 && c.width >= 0 && c.channels > 0 && c.kernels > 0 &&
           c.height % 2 == 0 && c.width % 2 == 0 && c.channels % kLanes == 0 &&
           (c.columns == 2 * kLanes || c.columns == 4 * kLanes) && c.kernels % c.columns == 0;
}

#if defined(SDA_AVX512_BF16)

SDA_AVX512_BF16 SDA_INLINE __m512 widen(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

SDA_AVX512_BF16 SDA_INLINE __m512 load(const uint16_t* from) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// Zeros where the mask is; nothing is read there.
SDA_AVX512_BF16 SDA_INLINE __m512 load(const uint16_t* from, __mmask16 mask) {
    return widen(_mm256_maskz_loadu_epi16(mask, from));
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

// Where a tile of all images begins.
struct Place {
    int64_t image, row, column;

    Place(const WinogradConvolution& c, int64_t tile) {
        const int64_t across = c.width / 2, of_image = c.height / 2 * across;
        image = tile / of_image;
        row = 2 * (tile % of_image / across);
        column = 2 * (tile % across);
    }
    void to_next(const WinogradConvolution& c) {
        column += 2;
        if (column < c.width) return;
        column = 0;
        row += 2;
        if (row < c.height) return;
        row = 0;
        ++image;
    }
};

// B^T d B of one tile to v, where frequencies lie `plane` apart. Whole: no pixel is beyond the image.
template <bool Whole>
SDA_AVX512_BF16 SDA_INLINE void transform_tile(const WinogradConvolution& c, const Place& at, uint16_t* v,
                                               int64_t plane) {
    const uint16_t* first = static_cast<const uint16_t*>(c.x) + at.image * c.x_stride_image +
                            (at.row - 1) * c.x_stride_row + (at.column - 1) * c.x_stride_pixel;
    uint32_t pixels = 0xFFFF;  // a bit for each of the tile's that is in the image
    if (at.row == 0) pixels &= 0xFFF0;
    if (at.row + 2 == c.height) pixels &= 0x0FFF;
    if (at.column == 0) pixels &= 0xEEEE;
    if (at.column + 2 == c.width) pixels &= 0x7777;
    for (int64_t channel = 0; channel < c.channels; channel += kLanes) {
        __m512 d[16], rows[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            const uint16_t* pixel = first + i / 4 * c.x_stride_row + i % 4 * c.x_stride_pixel + channel;
            d[i] = Whole ? load(pixel) : load(pixel, pixels >> i & 1 ? 0xFFFF : 0);
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) from_pixels(d[j], d[4 + j], d[8 + j], d[12 + j], rows + j, 4);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            __m512 columns[4];
            from_pixels(rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3], columns, 1);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) store(v + (4 * i + j) * plane + channel, columns[j]);
        }
    }
}

// The same of `tiles` tiles from `first` on, to v [16, pixel_plane].
SDA_AVX512_BF16 void transform_pixels(const WinogradConvolution& c, int64_t first, int64_t tiles,
                                      uint16_t* v) {
    const int64_t plane = pixel_plane(c);
    Place at(c, first);
    for (int64_t tile = 0; tile < tiles; ++tile, v += c.channels, at.to_next(c)) {
        const bool whole = at.row > 0 && at.row + 2 < c.height && at.column > 0 && at.column + 2 < c.width;
        whole ? transform_tile<true>(c, at, v, plane) : transform_tile<false>(c, at, v, plane);
    }
}

// m [Tiles, 16 Vectors] = v [Tiles, channels] times u [channels / 2, 16 Vectors, 2].
template <int Tiles, int Vectors>
SDA_AVX512_BF16 void multiply(const uint16_t* v, const uint16_t* u, int64_t channels, float* m) {
    constexpr int64_t kColumns = Vectors * kLanes;
    __m512 sums[Tiles][Vectors];
#pragma GCC unroll 12
    for (int tile = 0; tile < Tiles; ++tile) {
        for (int n = 0; n < Vectors; ++n) sums[tile][n] = _mm512_setzero_ps();
    }
    for (int64_t channel = 0; channel < channels; channel += 2, u += 2 * kColumns) {
        __m512bh weights[Vectors];
#pragma GCC unroll 4
        for (int n = 0; n < Vectors; ++n) weights[n] = (__m512bh)_mm512_loadu_si512(u + 2 * kLanes * n);
#pragma GCC unroll 12
        for (int tile = 0; tile < Tiles; ++tile) {
            int32_t pair;
            __builtin_memcpy(&pair, v + tile * channels + channel, sizeof pair);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int n = 0; n < Vectors; ++n)
                sums[tile][n] = _mm512_dpbf16_ps(sums[tile][n], both, weights[n]);
        }
    }
#pragma GCC unroll 12
    for (int tile = 0; tile < Tiles; ++tile) {
        for (int n = 0; n < Vectors; ++n) _mm512_storeu_ps(m + tile * kColumns + n * kLanes, sums[tile][n]);
    }
}

// The same for any number of tiles. A tile's sums do not depend on which ones it is computed with.
template <int Tiles, int Vectors>
void multiply_all(const uint16_t* v, const uint16_t* u, int64_t channels, int64_t tiles, float* m) {
    for (; tiles >= Tiles; tiles -= Tiles, v += Tiles * channels, m += Tiles * Vectors * kLanes) {
        multiply<Tiles, Vectors>(v, u, channels, m);
    }
    if constexpr (Tiles > 1) multiply_all<Tiles - 1, Vectors>(v, u, channels, tiles, m);
}

// A^T m A + bias of `tiles` tiles from `first` on, for `columns` kernels from `kernel` on; m is
// [16, sum_plane].
SDA_AVX512_BF16 void transform_sums(const WinogradConvolution& c, const float* m, int64_t first,
                                    int64_t tiles, int64_t kernel) {
    const int64_t pitch = c.columns, plane = sum_plane(c);
    Place at(c, first);
    for (int64_t tile = 0; tile < tiles; ++tile, at.to_next(c)) {
        uint16_t* pixel = static_cast<uint16_t*>(c.y) +
                          ((at.image * c.height + at.row) * c.width + at.column) * c.kernels + kernel;
        for (int64_t n = 0; n < pitch; n += kLanes) {
            const float* from = m + tile * pitch + n;
            __m512 upper[4], lower[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                const float* f = from + j * plane;
                to_pixels(_mm512_loadu_ps(f), _mm512_loadu_ps(f + 4 * plane), _mm512_loadu_ps(f + 8 * plane),
                          _mm512_loadu_ps(f + 12 * plane), upper + j, lower + j);
            }
            const __m512 offset = c.bias ? _mm512_loadu_ps(c.bias + kernel + n) : _mm512_setzero_ps();
            __m512 left, right;
            to_pixels(upper[0], upper[1], upper[2], upper[3], &left, &right);
            store(pixel + n, _mm512_add_ps(left, offset));
            store(pixel + c.kernels + n, _mm512_add_ps(right, offset));
            to_pixels(lower[0], lower[1], lower[2], lower[3], &left, &right);
            store(pixel + c.width * c.kernels + n, _mm512_add_ps(left, offset));
            store(pixel + (c.width + 1) * c.kernels + n, _mm512_add_ps(right, offset));
        }
    }
}

void convolve_block(const WinogradConvolution& c, int64_t block, uint16_t* v, float* m) {
    const int64_t size = block_tiles(c), first = block * size, tiles = std::min(size, all_tiles(c) - first);
    transform_pixels(c, first, tiles, v);
    const auto products = c.columns == 4 * kLanes ? multiply_all<6, 4> : multiply_all<12, 2>;
    for (int64_t kernel = 0; kernel < c.kernels; kernel += c.columns) {
        const uint16_t* u = static_cast<const uint16_t*>(c.packed) + kernel * kFrequencies * c.channels;
        for (int64_t f = 0; f < kFrequencies; ++f) {
            products(v + f * pixel_plane(c), u + f * c.channels * c.columns, c.channels, tiles,
                     m + f * sum_plane(c));
        }
        transform_sums(c, m, first, tiles, kernel);
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
