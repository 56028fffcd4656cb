// Low-pass guidance on the CPU; the formula stands in ../guidance.h.
#pragma once

#include <cstdint>

#include "../guidance.h"

namespace sda::cpu {

// Bytes of workspace that `guidance` needs with up to `threads` threads.
int64_t guidance_workspace(const GuidanceTensors& tensors, int threads);

// Fills cotangent, squares and, if it is not null, x0. An image's results depend neither on `threads` nor on
// the other images.
int guidance(const GuidanceTensors& tensors, void* workspace, int threads);

}  // namespace sda::cpu
