"""The shapes in which the operators see a batch of images, and the strides that they refuse.

There are several because the operators need different things: the noise the order of its elements, group_norm_silu the
channels, elementwise operators neither, and guidance, which takes a tensor's own four strides, the rows.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sda_fast.errors import SdaError
from sda_fast.ops._backend import core


def wrong_strides(x: Tensor, name: str, wanted: str) -> SdaError:
    return SdaError(
        f"{name} has shape {tuple(x.shape)} and strides {x.stride()}; {wanted}, so pass {name}.contiguous()."
    )


class ImageLayout(NamedTuple):
    """Of philox_normal: [images, outer, inner] with strides in elements (csrc/status.h).

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
    raise wrong_strides(x, name, "each image must be contiguous or channels_last")


class Strides(NamedTuple):
    """Of elementwise operators, which see images as [N, channels, pixels]; in elements (csrc/pixels.h)."""

    image: int
    channel: int
    pixel: int


def strides(x: Tensor, name: str) -> Strides:
    """Those of x [N, C, H, W]: contiguous, channels_last, or channels or images cut out of either.

    Raises SdaError where rows do not follow each other.
    """
    height, width = x.shape[2:]
    if width == 1:
        return Strides(x.stride(0), x.stride(1), x.stride(2))
    if height == 1 or x.stride(2) == width * x.stride(3):
        return Strides(x.stride(0), x.stride(1), x.stride(3))
    wanted = "its images must be contiguous or channels_last, or channels cut out of such"
    raise wrong_strides(x, name, wanted)


def pixels(x: Tensor | None, name: str) -> Any:
    """x as the compiled operators take it, a `_core.Pixels`; None as an absent tensor."""
    return core().Pixels(0, 0, 0, 0) if x is None else core().Pixels(x.data_ptr(), *strides(x, name))


class NormLayout(NamedTuple):
    """Of group_norm_silu: [images, channels, spatial] with strides in elements (csrc/cpu/group_norm_silu.h).

    stride_spatial is 1 where an image is contiguous, else stride_channel is 1.
    """

    images: int
    channels: int
    spatial: int
    stride_image: int
    stride_channel: int
    stride_spatial: int


def norm_layout(x: Tensor, name: str) -> NormLayout:
    """The layout of x [N, C, ...]. Raises SdaError where an image is neither contiguous nor channels_last."""
    if torch.compiler.is_compiling():  # Dynamo traces the function itself, and warns of a cache
        layout = _norm_layout(x.shape, x.stride())
    else:
        try:
            layout = _known_norm_layout(x.shape, x.stride())
        except TypeError:  # sizes that are symbols cannot be looked up
            layout = _norm_layout(x.shape, x.stride())
    if layout is None:
        raise wrong_strides(x, name, "each image must be contiguous or channels_last")
    return layout


def _norm_layout(shape: tuple[int, ...], all_strides: tuple[int, ...]) -> NormLayout | None:
    images, channels, *sizes = shape
    stride_image, stride_channel, *strides = all_strides
    spatial = math.prod(sizes) if images and channels else 0
    if images * channels * spatial == 0 or _dense((channels, *sizes), (stride_channel, *strides), 1):
        return NormLayout(images, channels, spatial, stride_image, spatial, 1)
    pitch = next((stride for size, stride in zip(sizes[::-1], strides[::-1], strict=True) if size > 1), channels)
    if stride_channel == 1 and channels > 1 and pitch >= channels and _dense(sizes, strides, pitch):
        return NormLayout(images, channels, spatial, stride_image, 1, pitch)
    return None


_known_norm_layout = functools.lru_cache(4096)(_norm_layout)  # a network asks for the same few at every step


def _dense(sizes: tuple[int, ...] | list[int], strides: tuple[int, ...] | list[int], unit: int) -> bool:
    """Whether the last index moves by `unit` and every other one by what the ones behind it span."""
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != unit:
            return False
        unit *= size
    return True
