// Counter-based normal noise on a CUDA device; the formula stands in ../philox.h.
#pragma once

#include <cstdint>

#include "../status.h"

namespace sda::cuda {

// As the functions of ../cpu/philox_normal.h, with device pointers and a cudaStream_t on the current device;
// returns without waiting for it.
int philox_normal(void* out, int dtype, const ImageLayout& layout, uint64_t seed, const int64_t* identities,
                  uint32_t step, void* stream);

int philox_words(uint32_t* out, int64_t images, int64_t blocks, int64_t first_block, uint64_t seed,
                 const int64_t* identities, uint32_t step, void* stream);

// "CUDA error 209: no kernel image is available ..." for a status of kCudaErrorBase or above.
const char* error_string(int status);

}  // namespace sda::cuda
