"""Cubic resizing in the manner of ResizeRight (Shocher), and the low-pass filter phi of DDA and SDA.

Everything is computed anew in every call, as published: grid, fields of view, weights, padding, gather.
The filter is linear and separable: the fast version puts one constant matrix per axis in its place.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SUPPORT = 4  # input pixels that the cubic kernel reaches
EPS = torch.finfo(torch.float32).eps


def cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -1/2 (Keys 1981), zero outside [-2, 2]."""
    r = x.abs()
    inner = 1.5 * r**3 - 2.5 * r**2 + 1
    outer = -0.5 * r**3 + 2.5 * r**2 - 4 * r + 2
    return torch.where(r <= 1, inner, torch.where(r <= 2, outer, 0.0))


def resize_axis(x: Tensor, dim: int, scale: float, size: int) -> Tensor:
    """Resize one axis of `x` to `size` pixels; neighbouring output pixels stand 1/scale input pixels apart.

    For scale < 1 the kernel is stretched by 1/scale (antialiasing). Weights are normalised before the zero
    padding is seen, so values fade towards the border. Weights are float32, as in the original.
    """
    n = x.shape[dim]
    shrink = min(scale, 1.0)
    support = SUPPORT / shrink
    # centre of every output pixel in input coordinates: the centres of both images coincide
    centre = torch.arange(size, device=x.device) / scale + (n - 1) / 2 - (size - 1) / (2 * scale)
    left = torch.ceil(centre - support / 2 - EPS).long()
    view = left[:, None] + torch.arange(math.ceil(support - EPS), device=x.device)  # [size, taps]

    # Reading the padding off the view makes the host wait for the device, in every call.
    before, after = -int(view[0, 0]), int(view[-1, -1]) - n + 1
    weights = cubic((centre[:, None] - view) * shrink)
    weights = weights / weights.sum(dim=1, keepdim=True)

    rows = x.transpose(dim, 0)
    rows = F.pad(rows, [0, 0] * (x.ndim - 1) + [before, after])
    weights = weights.reshape(*weights.shape, *[1] * (x.ndim - 1))
    return (rows[view + before] * weights).sum(dim=1).transpose(dim, 0)


def resize(x: Tensor, scale: float, size: tuple[int, int]) -> Tensor:
    """Resize the last two axes of a floating-point tensor [..., H, W] to `size`; differentiable."""
    x = resize_axis(x, x.ndim - 2, scale, size[0])
    return resize_axis(x, x.ndim - 1, scale, size[1])


def low_pass(x: Tensor, factor: int) -> Tensor:
    """phi(x) = up(down(x)) of images [..., H, W]; H and W are divided by `factor` (floor) and restored."""
    height, width = x.shape[-2:]
    down = resize(x, 1 / factor, (height // factor, width // factor))
    return resize(down, float(factor), (height, width))
