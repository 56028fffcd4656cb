// Where the images of a tensor [N, C, H, W] lie.
#pragma once

#include <cstdint>

namespace sda {

// Images seen as [images, channels, pixels]; strides in elements. Contiguous is stride_channel = pixels,
// stride_pixel = 1; channels_last is stride_channel = 1, stride_pixel = channels. An absent tensor has no
// data.
struct Pixels {
    void* data;
    int64_t stride_image;
    int64_t stride_channel;
    int64_t stride_pixel;
};

}  // namespace sda
