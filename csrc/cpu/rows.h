// Between tensors of any dtype and stride and the float32 side by side that the operators' loops compute
// with.
#pragma once

#include <cstdint>

#include "../status.h"

namespace sda::cpu {

inline bool known(int dtype) { return dtype == kFloat32 || dtype == kBfloat16 || dtype == kFloat16; }

inline int64_t bytes(int dtype) { return dtype == kFloat32 ? 4 : 2; }

// `count` pixels with `lanes` channels each; strides in elements.
struct Row {
    int64_t count, lanes;
    int64_t stride_pixel, stride_lane;

    // As float32 [count, lanes] lies.
    bool side_by_side() const { return stride_pixel == lanes && (lanes == 1 || stride_lane == 1); }
};

// The row that begins at `element` of `data` as float32 [count, lanes]: where it lies if it lies so, else in
// the buffer.
const float* read_row(float* buffer, const void* data, int dtype, int64_t element, const Row& row);

// Writes float32 [count, lanes] as the row that begins at `element` of `data`. Halves must lie side by side.
void write_row(void* data, int dtype, int64_t element, const Row& row, const float* from);

}  // namespace sda::cpu
