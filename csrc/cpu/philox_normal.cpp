#include "philox_normal.h"

#include <algorithm>

#include "../philox.h"
#include "clones.h"
#include "parallel.h"

namespace sda::cpu {
namespace {

constexpr int64_t kChunk = 64 * kDrawnBlocks;     // blocks that one work item draws
constexpr int64_t kGrain = 16;                    // work items worth a thread: 65,536 elements, about 0.2 ms
constexpr int64_t kMaxBlocks = int64_t{1} << 32;  // the block is one word of the counter

void store(float* image, const ImageLayout& layout, int64_t element, const float* values, int64_t count) {
    if (layout.outer == 1 && layout.stride_inner == 1) {
        std::copy(values, values + count, image + element);
        return;
    }
    int64_t outer = element / layout.inner;
    int64_t inner = element % layout.inner;
    for (int64_t i = 0; i < count; ++i) {
        image[outer * layout.stride_outer + inner * layout.stride_inner] = values[i];
        if (++inner == layout.inner) {
            inner = 0;
            ++outer;
        }
    }
}

}  // namespace

SDA_CLONES void draw_normals(float* normals, int64_t first_block, int64_t blocks, uint64_t seed,
                             uint32_t step, uint64_t identity) {
    for (int64_t done = 0; done < blocks; done += kDrawnBlocks, normals += 4 * kDrawnBlocks) {
        uint32_t words[4][kDrawnBlocks];
        for (int64_t lane = 0; lane < kDrawnBlocks; ++lane) {
            const uint32_t block = static_cast<uint32_t>(first_block + done + lane);
            const Words w = philox4x32(seed, block, step, identity);
            words[0][lane] = w.w0;
            words[1][lane] = w.w1;
            words[2][lane] = w.w2;
            words[3][lane] = w.w3;
        }
        // Apart from the words, so that the compiler vectorises it.
        float pairs[4][kDrawnBlocks];
        for (int64_t lane = 0; lane < kDrawnBlocks; ++lane) {
            box_muller(words[0][lane], words[1][lane], &pairs[0][lane], &pairs[1][lane]);
        }
        for (int64_t lane = 0; lane < kDrawnBlocks; ++lane) {
            box_muller(words[2][lane], words[3][lane], &pairs[2][lane], &pairs[3][lane]);
        }
        for (int64_t lane = 0; lane < kDrawnBlocks; ++lane) {
            for (int64_t k = 0; k < 4; ++k) normals[4 * lane + k] = pairs[k][lane];
        }
    }
}

int philox_normal(void* out, int dtype, const ImageLayout& layout, uint64_t seed, const int64_t* identities,
                  uint32_t step, int threads) {
    if (dtype != kFloat32) return kBadDtype;
    if (!valid(layout)) return kBadArgument;
    const int64_t elements = layout.outer * layout.inner;
    const int64_t blocks = (elements + 3) / 4;
    if (blocks > kMaxBlocks) return kBadArgument;
    const int64_t chunks = (blocks + kChunk - 1) / kChunk;
    parallel_for(layout.images * chunks, kGrain, threads, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t n = item / chunks;
            float* image = static_cast<float*>(out) + n * layout.stride_image;
            const int64_t first = item % chunks * kChunk;
            const int64_t last = std::min(first + kChunk, blocks);
            float normals[4 * kDrawnBlocks];
            for (int64_t block = first; block < last; block += kDrawnBlocks) {
                draw_normals(normals, block, kDrawnBlocks, seed, step, static_cast<uint64_t>(identities[n]));
                store(image, layout, 4 * block, normals, std::min(4 * kDrawnBlocks, elements - 4 * block));
            }
        }
    });
    return kOk;
}

int philox_words(uint32_t* out, int64_t images, int64_t blocks, int64_t first_block, uint64_t seed,
                 const int64_t* identities, uint32_t step) {
    if (images < 0 || blocks < 0 || first_block < 0 || first_block + blocks > kMaxBlocks) return kBadArgument;
    for (int64_t n = 0; n < images; ++n) {
        for (int64_t b = 0; b < blocks; ++b) {
            const Words w = philox4x32(seed, static_cast<uint32_t>(first_block + b), step,
                                       static_cast<uint64_t>(identities[n]));
            uint32_t* row = out + 4 * (n * blocks + b);
            row[0] = w.w0;
            row[1] = w.w1;
            row[2] = w.w2;
            row[3] = w.w3;
        }
    }
    return kOk;
}

int box_muller_pairs(float* out, const uint32_t* words, int64_t pairs) {
    if (pairs < 0) return kBadArgument;
    for (int64_t i = 0; i < pairs; ++i) {
        box_muller(words[2 * i], words[2 * i + 1], &out[2 * i], &out[2 * i + 1]);
    }
    return kOk;
}

}  // namespace sda::cpu
