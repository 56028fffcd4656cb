// The reverse step on the CPU; the formula stands in ../reverse_step.h.
#pragma once

#include "../reverse_step.h"

namespace sda::cpu {

// Writes s.result. It may lie exactly where x does. Nothing depends on `threads`.
int reverse_step(const ReverseStep& s, int threads);

}  // namespace sda::cpu
