"""The shape in which elementwise operators see images: [N, channels, pixels] with any strides."""

from typing import Any, NamedTuple

from torch import Tensor

from sda_fast.errors import SdaError
from sda_fast.ops._backend import core


class Strides(NamedTuple):
    """In elements (csrc/pixels.h)."""

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
    raise SdaError(
        f"{name} has shape {tuple(x.shape)} and strides {x.stride()}; its images must be contiguous or channels_last, "
        f"or channels cut out of such, so pass {name}.contiguous()."
    )


def pixels(x: Tensor | None, name: str) -> Any:
    """x as the compiled operators take it, a `_core.Pixels`; None as an absent tensor."""
    return core().Pixels(0, 0, 0, 0) if x is None else core().Pixels(x.data_ptr(), *strides(x, name))
