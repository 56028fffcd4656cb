// Quantisation of images for storage, on the CPU.
#pragma once

#include "../pixels.h"

namespace sda::cpu {

// [-1, 1] to bytes, [images, channels, pixels] to [images, pixels, channels] side by side:
//
//   round:    floor(255 ((x + 1) / 2) + 1/2), as DDA's and SDA's save_image
//   truncate: floor(127.5 x + 128), as DiT's sampler
//
// clamped to 0 .. 255, with every product and sum rounded by itself in float32; NaN becomes 0. Halves are
// widened first. `dtype` is that of x. Nothing depends on `threads`.
int to_uint8(uint8_t* out, const Pixels& x, int dtype, int64_t images, int64_t channels, int64_t pixels,
             bool truncate, int threads);

}  // namespace sda::cpu
