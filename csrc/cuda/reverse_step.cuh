// The reverse step on a CUDA device; the formula stands in ../reverse_step.h.
#pragma once

#include "../reverse_step.h"

namespace sda::cuda {

// As the function of ../cpu/reverse_step.h, with device pointers and a cudaStream_t on the current device;
// returns without waiting for it. One launch, which reads table and position when it runs.
int reverse_step(const ReverseStep& s, void* stream);

}  // namespace sda::cuda
