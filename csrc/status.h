// What every entry point of csrc takes and returns. No entry point throws; only the Python binding does.
#pragma once

#include <cstdint>

namespace sda {

// Zero is success; the binding turns the rest into exceptions.
enum Status : int {
    kOk = 0,
    kBadArgument = 1,
    kBadDtype = 2,
    // Values from here on are kCudaErrorBase + cudaError_t.
    kCudaErrorBase = 1000,
};

enum Dtype : int {
    kFloat32 = 0,
    kBfloat16 = 1,
    kFloat16 = 2,
};

// A batch of images seen as [images, outer, inner], strides in elements. The logical C-order index of an
// element within its image is outer_index * inner + inner_index. Contiguous [N, C, H, W] is outer = 1, inner
// = C*H*W; channels_last is outer = C with stride 1, inner = H*W with stride C.
struct ImageLayout {
    int64_t images;
    int64_t outer;
    int64_t inner;
    int64_t stride_image;
    int64_t stride_outer;
    int64_t stride_inner;
};

inline bool valid(const ImageLayout& layout) {
    return layout.images >= 0 && layout.outer >= 0 && layout.inner >= 0;
}

}  // namespace sda
