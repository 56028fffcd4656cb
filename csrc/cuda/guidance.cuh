// Low-pass guidance on a CUDA device; the formula stands in ../guidance.h.
#pragma once

#include <cstdint>

#include "../guidance.h"

namespace sda::cuda {

// Bytes of workspace that `guidance` needs, on the device and aligned to 16 bytes.
int64_t guidance_workspace(const GuidanceTensors& tensors);

// Fills cotangent, squares and, if it is not null, x0, on the current device; returns without waiting for it.
int guidance(const GuidanceTensors& tensors, void* workspace, void* stream);

}  // namespace sda::cuda
