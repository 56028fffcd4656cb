"""Operators in terms of others, for tracing: each function has the signature of the operator it stands for.

The formulas are those of `sda_fast.reference`, written with as few operators as possible, since a graph holds a hundred
of each.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions

import sda_fast.ops  # noqa: F401  (registers them)
from sda_fast.reference import guidance as lowpass

aten = torch.ops.aten
ours = torch.ops.sda_fast


def _convolution_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    mask: list[bool],
) -> tuple[Tensor, None, None]:
    """The gradient by x, as an ordinary convolution with the kernel flipped and its channels exchanged."""
    if mask[1] or mask[2] or transposed or groups != 1:
        raise NotImplementedError("only the input's gradient of a plain convolution is traced")
    sizes = weight.shape[2:]
    if all(s == 1 for s in stride):
        kernel = weight.transpose(0, 1).flip(list(range(2, weight.dim())))
        reach = [d * (k - 1) - p for d, k, p in zip(dilation, sizes, padding, strict=True)]
        return aten.convolution(dy, kernel, None, stride, reach, dilation, False, output_padding, 1), None, None
    # What a strided convolution did not reach at the far edge.
    left = [
        x.shape[2 + i] - ((dy.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (sizes[i] - 1) + 1)
        for i in range(len(sizes))
    ]
    return aten.convolution(dy, weight, None, stride, padding, dilation, True, left, 1), None, None


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    attn_mask: Any = None,
    scale: Any = None,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(C)) v and the logarithm of the softmax's denominator; all [N, heads, T, C]."""
    assert (dropout, causal, attn_mask) == (0.0, False, None)
    scores = _scores(q, k, scale)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse


def _attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    dropout: float,
    causal: bool,
    *,
    attn_mask: Any = None,
    scale: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    probabilities = (_scores(q, k, scale) - lse[..., None]).exp()
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    dv = probabilities.to(dy.dtype).transpose(-1, -2) @ dy
    along = (dy.float() * y.float()).sum(-1, keepdim=True)
    dscores = probabilities * ((dy @ v.transpose(-1, -2)).float() - along)
    dscores = (dscores * factor).to(q.dtype)
    return dscores @ k, dscores.transpose(-1, -2) @ q, dv


def _scores(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    # Half of the scale on either side, which keeps float16 from overflowing.
    root = (q.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    return ((q * root) @ (k * root).transpose(-1, -2)).float()


def _group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    assert x_bias is None  # which a traced network does not have: `engines.fusion` sets it afterwards
    members = x.float().reshape(x.shape[0], groups, -1)
    mean = members.mean(2, keepdim=True)
    centred = members - mean
    rstd = ((centred * centred).mean(2, keepdim=True) + eps).rsqrt()
    gain, offset = _affine(x, weight, bias, scale, shift)
    u = (centred * rstd).reshape(x.shape) * gain + offset
    return (u * u.sigmoid() if silu else u).to(x.dtype), mean.squeeze(2), rstd.squeeze(2)


def _group_norm_silu_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    silu: bool,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    assert (x_bias, residual) == (None, None)  # as above
    gain, offset = _affine(x, weight, bias, scale, shift)
    normalised = (x.float().reshape(*mean.shape, -1) - mean[:, :, None]) * rstd[:, :, None]
    du = dy.float()
    if silu:
        u = normalised.reshape(x.shape) * gain + offset
        sigmoid = u.sigmoid()
        du = du * (sigmoid * (1 + u - u * sigmoid))
    cotangent = (du * gain).reshape(normalised.shape)
    along = (cotangent * normalised).mean(2, keepdim=True)
    dx = (cotangent - cotangent.mean(2, keepdim=True) - normalised * along) * rstd[:, :, None]
    return dx.reshape(x.shape).to(x.dtype)


def _affine(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What the normalised x is multiplied by and then raised by, float32 [1 or N, C, 1, ...]."""
    ones = [1] * (x.dim() - 2)
    gain, offset = (p.float().reshape(1, -1, *ones) for p in (weight, bias))
    if scale is not None:
        factor = 1 + scale.float().reshape(*scale.shape, *ones)
        gain, offset = gain * factor, offset * factor
    if shift is not None:
        offset = offset + shift.float().reshape(*shift.shape, *ones)
    return gain, offset


def _native_group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, n: int, channels: int, positions: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _group_norm_silu(x, weight, bias, groups, eps, None, None, False)


def _native_group_norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    n: int,
    channels: int,
    positions: int,
    groups: int,
    mask: list[bool],
) -> tuple[Tensor, None, None]:
    zero = torch.zeros_like(weight)  # the bias, which the gradient does not depend on
    return _group_norm_silu_backward(dy, x, weight, zero, mean, rstd, None, None, groups, False), None, None


def _slice_backward(dy: Tensor, sizes: list[int], dim: int, start: int, end: int, step: int) -> Tensor:
    assert step == 1
    before, after = list(dy.shape), list(dy.shape)
    before[dim], after[dim] = start, sizes[dim] - start - dy.shape[dim]
    return torch.cat([dy.new_zeros(before), dy, dy.new_zeros(after)], dim)


def _guidance(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    cotangent, squares, _ = lowpass.guidance(*arguments)
    return cotangent, squares


def _upsample(x: Tensor, size: list[int], *scales: float | None) -> Tensor:
    n, c, height, width = x.shape
    up, across = size[0] // height, size[1] // width
    return x[:, :, :, None, :, None].expand(n, c, height, up, width, across).reshape(n, c, *size)


def _upsample_backward(dy: Tensor, size: list[int], shape: list[int], *scales: float | None) -> Tensor:
    n, c, height, width = shape
    return dy.reshape(n, c, height, size[0] // height, width, size[1] // width).sum((3, 5))


def _avg_pool(x: Tensor, kernel: list[int], *rest: Any) -> Tensor:
    n, c, height, width = x.shape
    down, across = kernel
    return x.reshape(n, c, height // down, down, width // across, across).mean((3, 5))


def _avg_pool_backward(dy: Tensor, x: Tensor, kernel: list[int], *rest: Any) -> Tensor:
    height, width = x.shape[2:]
    return _upsample(dy / (kernel[0] * kernel[1]), [height, width])


NATIVE: dict[Any, Callable[..., Any]] = {
    aten.convolution_backward.default: _convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
}

PORTABLE: dict[Any, Callable[..., Any]] = {
    **NATIVE,
    ours.group_norm_silu.default: _group_norm_silu,
    ours.group_norm_silu_backward.default: _group_norm_silu_backward,
    ours.guidance.default: _guidance,
    aten.native_group_norm.default: _native_group_norm,
    aten.native_group_norm_backward.default: _native_group_norm_backward,
    aten.slice_backward.default: _slice_backward,
    **get_decompositions([aten.silu_backward]),
    aten.upsample_nearest2d.default: _upsample,
    aten.upsample_nearest2d_backward.default: _upsample_backward,
    aten.avg_pool2d.default: _avg_pool,
    aten.avg_pool2d_backward.default: _avg_pool_backward,
}
