"""The shape in which the operators see a batch of images."""

from typing import NamedTuple

from torch import Tensor

from sda_fast.errors import SdaError


class ImageLayout(NamedTuple):
    """[images, outer, inner] with strides in elements.

    The logical index of an element within its image is outer_index * inner + inner_index.
    """

    images: int
    outer: int
    inner: int
    stride_image: int
    stride_outer: int
    stride_inner: int


def image_layout(x: Tensor, name: str) -> ImageLayout:
    """The layout of x [N, ...]: every image contiguous, or [N, C, H, W] in channels_last.

    The images may lie apart. Raises SdaError for any other stride.
    """
    images, inner = x.shape[0], x[0].numel() if x.shape[0] else 0
    if images == 0 or inner == 0 or x[0].is_contiguous():
        return ImageLayout(images, 1, inner, x.stride(0), inner, 1)
    if x.dim() == 4 and x[0].permute(1, 2, 0).is_contiguous():
        channels, height, width = x.shape[1:]
        return ImageLayout(images, channels, height * width, x.stride(0), 1, channels)
    raise SdaError(
        f"{name} has shape {tuple(x.shape)} and strides {x.stride()}; each image must be contiguous or "
        f"channels_last, so pass {name}.contiguous()."
    )
