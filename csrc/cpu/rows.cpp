#include "rows.h"

#include <cstring>

#include "../narrow.h"
#include "clones.h"

namespace sda::cpu {
namespace {

template <class T>
SDA_INLINE void widen_all(float* to, const T* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
}

template <class T>
SDA_INLINE void gather_lanes(float* to, const T* from, const Row& row, int64_t lanes) {
    for (int64_t p = 0; p < row.count; ++p) {
        for (int64_t c = 0; c < lanes; ++c)
            to[p * lanes + c] = widen(from[p * row.stride_pixel + c * row.stride_lane]);
    }
}

// One and three lanes, which are nearly all there is, have loops of their own.
template <class T>
SDA_INLINE void gather(float* to, const T* from, const Row& row) {
    if (row.side_by_side()) {
        widen_all(to, from, row.count * row.lanes);
    } else if (row.lanes == 1) {
        for (int64_t p = 0; p < row.count; ++p) to[p] = widen(from[p * row.stride_pixel]);
    } else if (row.lanes == 3 && row.stride_lane == 1) {
        gather_lanes(to, from, {row.count, 3, row.stride_pixel, 1}, 3);
    } else {
        gather_lanes(to, from, row, row.lanes);
    }
}

SDA_CLONES void gather_float32(float* to, const float* from, const Row& row) { gather(to, from, row); }

SDA_CLONES void gather_bfloat16(float* to, const Bfloat16* from, const Row& row) { gather(to, from, row); }

SDA_CLONES void gather_float16(float* to, const Float16* from, const Row& row) { gather(to, from, row); }

SDA_CLONES void narrow_bfloat16(Bfloat16* to, const float* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = narrow<Bfloat16>(from[i]);
}

SDA_CLONES void narrow_float16(Float16* to, const float* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = narrow<Float16>(from[i]);
}

void scatter(float* to, const Row& row, const float* from) {
    if (row.side_by_side()) {
        std::memcpy(to, from, static_cast<size_t>(row.count * row.lanes) * sizeof(float));
        return;
    }
    for (int64_t c = 0; c < row.lanes; ++c) {
        for (int64_t p = 0; p < row.count; ++p)
            to[p * row.stride_pixel + c * row.stride_lane] = from[p * row.lanes + c];
    }
}

}  // namespace

const float* read_row(float* buffer, const void* data, int dtype, int64_t element, const Row& row) {
    if (dtype == kBfloat16) {
        gather_bfloat16(buffer, static_cast<const Bfloat16*>(data) + element, row);
    } else if (dtype == kFloat16) {
        gather_float16(buffer, static_cast<const Float16*>(data) + element, row);
    } else if (row.side_by_side()) {
        return static_cast<const float*>(data) + element;
    } else {
        gather_float32(buffer, static_cast<const float*>(data) + element, row);
    }
    return buffer;
}

void write_row(void* data, int dtype, int64_t element, const Row& row, const float* from) {
    if (dtype == kBfloat16) {
        narrow_bfloat16(static_cast<Bfloat16*>(data) + element, from, row.count * row.lanes);
    } else if (dtype == kFloat16) {
        narrow_float16(static_cast<Float16*>(data) + element, from, row.count * row.lanes);
    } else {
        scatter(static_cast<float*>(data) + element, row, from);
    }
}

}  // namespace sda::cpu
