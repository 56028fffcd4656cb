// Counter-based normal noise on the CPU; the formula stands in ../philox.h.
#pragma once

#include <cstdint>

#include "../status.h"

namespace sda::cpu {

// Writes the noise of every image at one step. `out` has `layout` and dtype code `dtype` (float32 only);
// `identities` holds layout.images values. The result does not depend on `threads`.
int philox_normal(void* out, int dtype, const ImageLayout& layout, uint64_t seed, const int64_t* identities,
                  uint32_t step, int threads);

// The noise of `blocks` Philox blocks of one image, 4 normals each, from first_block on. `blocks` is rounded
// up to a multiple of kDrawnBlocks, and `normals` holds so many.
constexpr int64_t kDrawnBlocks = 16;  // drawn at once: enough to fill any vector unit
void draw_normals(float* normals, int64_t first_block, int64_t blocks, uint64_t seed, uint32_t step,
                  uint64_t identity);

// The raw words behind the noise, for tests: out[image][b][0..3] = Philox words of block first_block + b.
int philox_words(uint32_t* out, int64_t images, int64_t blocks, int64_t first_block, uint64_t seed,
                 const int64_t* identities, uint32_t step);

// Box-Muller alone, for tests: pairs of words (radius, angle) to pairs of normals.
int box_muller_pairs(float* out, const uint32_t* words, int64_t pairs);

}  // namespace sda::cpu
