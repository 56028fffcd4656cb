"""GroupNorm, scale and shift per image and SiLU in one pass over the statistics and one over the values.

Backends: C++ and Triton. There is no CUDA version: the operator only moves memory, which Triton's does as well; one
would be added where it measures faster on a device.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor

from sda_fast.errors import SdaError
from sda_fast.ops._backend import core, dtype_code, on_device_of, select
from sda_fast.ops._checks import DTYPES, check_device, check_dtype, check_shape
from sda_fast.ops._layout import norm_layout
from sda_fast.reference import group_norm_silu as plain

VERSIONS = ("cpp", "triton", "plain")
WIDE = 8  # channels that a thread of Triton's version reads or writes at once, at most


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int = 32,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    x_bias: Tensor | None = None,
) -> Tensor:
    """y = u sigmoid(u) with u = (GroupNorm(x + x_bias) weight + bias) (1 + scale) + shift; y = u without `silu`.

    GroupNorm subtracts the mean over each group of C / groups neighbouring channels and all positions of an image and
    divides by sqrt(variance + eps), the variance being that of the population. Everything is computed in float32. An
    image's result does not depend on the other images of the batch. Source: Wu and He, "Group normalization", 2018,
    equations 1 to 3; scale and shift as in Dhariwal and Nichol, 2021, section 3.1 (AdaGN).

    x: [N, C, ...] float32, bfloat16 or float16, contiguous or channels_last; the images may lie apart, and x may be a
        slice of channels.
    weight, bias: [C], float32 or x's dtype.
    scale, shift: [N, C], float32 or x's dtype, or None for zero; rows may lie apart, as halves of [N, 2C] do.
    x_bias: [C], float32 or x's dtype, or None for zero: what a convolution would add in a pass over memory of its own.
    Returns y in x's shape, dtype and memory format.

    The gradient flows to x alone; the backward pass keeps x and two numbers per group.

    Raises SdaError for a wrong shape, dtype, device or stride, for a number of groups that does not divide C, and where
    weight, bias, scale, shift or x_bias require a gradient.
    """
    _check(x, weight, bias, groups, eps, scale, shift, x_bias)
    if torch.is_grad_enabled():
        _refuse_gradients({"weight": weight, "bias": bias, "scale": scale, "shift": shift, "x_bias": x_bias})
    y, _, _ = torch.ops.sda_fast.group_norm_silu(x, weight, bias, groups, eps, scale, shift, silu, x_bias)
    return y


@torch.library.custom_op("sda_fast::group_norm_silu", mutates_args=())
def _forward(
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
    """y, and float32 [N, groups]: mean and 1 / sqrt(variance + eps)."""
    _check(x, weight, bias, groups, eps, scale, shift, x_bias)
    version = select("group_norm_silu", x.device, VERSIONS)
    y, mean, rstd = _empty_outputs(x, groups)
    if x.numel() == 0:
        return y, mean.fill_(torch.nan), rstd.fill_(torch.nan)
    if version == "plain":
        y.copy_(plain.group_norm_silu(x, weight, bias, groups, eps, scale, shift, silu, x_bias))
        statistics = plain.group_norm_statistics(plain.add_channels(x, x_bias), groups, eps)
        for statistic, value in zip((mean, rstd), statistics, strict=True):
            statistic.copy_(value)
        return y, mean, rstd
    vectors = _vectors(weight, bias, scale, shift, x_bias)
    where_x, where_y = norm_layout(x, "x"), norm_layout(y, "y")
    if version == "triton":
        from sda_fast.kernels import group_norm_silu as kernel

        layouts = (where_x, where_y)
        with on_device_of(x):
            kernel.group_norm_silu(x, y, mean, rstd, *vectors, eps=eps, silu=silu, layouts=layouts)
        return y, mean, rstd
    c = core()
    parameters, _alive = _parameters(vectors, groups, silu)
    addresses = (t.data_ptr() for t in (x, y, mean, rstd))
    layouts = (c.NormLayout(*where_x), c.NormLayout(*where_y))
    threads = torch.get_num_threads()
    workspace = x.new_empty(c.group_norm_silu_cpu_workspace(layouts[0], threads), dtype=torch.uint8)
    rest = (eps, workspace.data_ptr(), threads)
    c.group_norm_silu_cpu(*addresses, dtype_code(x.dtype), *layouts, parameters, *rest)
    return y, mean, rstd


@_forward.register_fake
def _(
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
    return _empty_outputs(x, groups)


@torch.library.custom_op("sda_fast::group_norm_silu_backward", mutates_args=())
def _backward(
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
    """The gradient with respect to x plus `residual`, in x's memory format; both and dy have x's shape and dtype."""
    _check(x, weight, bias, groups, 0.0, scale, shift, x_bias)
    _check_cotangent(dy, x, mean, rstd, groups, residual)
    version = select("group_norm_silu", x.device, VERSIONS)
    dx = _empty_like(x)
    if x.numel() == 0:
        return dx
    if version == "plain":
        optional = (scale, shift, groups, silu, x_bias, residual)
        return dx.copy_(plain.group_norm_silu_backward(dy, x, weight, bias, mean, rstd, *optional))
    vectors = _vectors(weight, bias, scale, shift, x_bias)
    if version == "triton":
        _gradient_in_triton(dy, x, [dx], residual, mean, rstd, vectors, silu)
        return dx
    dy, mean, rstd = _in_format_of(dy, dx), mean.contiguous(), rstd.contiguous()
    added = dy if residual is None else _in_format_of(residual, dx)
    layouts = [norm_layout(t, name) for t, name in ((dy, "dy"), (x, "x"), (dx, "dx"), (added, "residual"))]
    c = core()
    parameters, _alive = _parameters(vectors, groups, silu)
    addresses = (dy.data_ptr(), x.data_ptr(), dx.data_ptr(), 0 if residual is None else added.data_ptr())
    where = [c.NormLayout(*layout) for layout in layouts]
    threads = torch.get_num_threads()
    workspace = x.new_empty(c.group_norm_silu_cpu_workspace(where[1], threads), dtype=torch.uint8)
    rest = (workspace.data_ptr(), threads)
    statistics = (mean.data_ptr(), rstd.data_ptr())
    c.group_norm_silu_backward_cpu(*addresses, *statistics, dtype_code(x.dtype), *where, parameters, *rest)
    return dx


@_backward.register_fake
def _(
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
    return _empty_like(x)


def _gradient_in_triton(
    dy: Tensor,
    x: Tensor,
    parts: list[Tensor],
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    vectors: list[Tensor | None],
    silu: bool,
) -> None:
    """Writes the gradient into `parts`, one or two, whose channels follow each other."""
    from sda_fast.kernels import group_norm_silu_backward as kernel

    dy, mean, rstd = _in_format_of(dy, parts[0]), mean.contiguous(), rstd.contiguous()
    read = [dy, x] if residual is None else [dy, x, _in_format_of(residual, parts[0])]
    layouts = [[norm_layout(t, "a tensor") for t in tensors] for tensors in (read, parts)]
    with on_device_of(x):
        kernel.group_norm_silu_backward(read, parts, mean, rstd, *vectors, silu=silu, layouts=layouts)


@torch.library.custom_op("sda_fast::group_norm_silu_backward_split", mutates_args=())
def _backward_split(
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
    first: int,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """group_norm_silu_backward's result as two tensors without gaps, of the `first` channels and of the others: what
    the parts of a concatenation are given."""
    parts = _empty_parts(x, first)
    whole = (weight, bias, mean, rstd, scale, shift, groups, silu, x_bias, residual)
    in_triton = select("group_norm_silu", x.device, VERSIONS) == "triton"
    if not in_triton or x.numel() == 0 or first % WIDE or x.shape[1] % WIDE:
        for part, values in zip(parts, _backward(dy, x, *whole).tensor_split([first], dim=1), strict=True):
            part.copy_(values)
        return parts
    _check(x, weight, bias, groups, 0.0, scale, shift, x_bias)
    _check_cotangent(dy, x, mean, rstd, groups, residual)
    vectors = _vectors(weight, bias, scale, shift, x_bias)
    _gradient_in_triton(dy, x, list(parts), residual, mean, rstd, vectors, silu)
    return parts


@_backward_split.register_fake
def _(
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
    first: int,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _empty_parts(x, first)


def _empty_parts(x: Tensor, first: int) -> tuple[Tensor, Tensor]:
    if not 0 < first < x.shape[1]:
        raise SdaError(f"first is {first}; choose a number of channels between 0 and the {x.shape[1]} of x.")
    return _empty_like(x, first), _empty_like(x, x.shape[1] - first)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, ctx.groups, _, scale, shift, ctx.silu, x_bias = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, mean, rstd, scale, shift, x_bias)


def _differentiate(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, rstd, scale, shift, x_bias = ctx.saved_tensors
    _refuse_gradients({"weight": weight, "bias": bias, "scale": scale, "shift": shift, "x_bias": x_bias})
    dx = torch.ops.sda_fast.group_norm_silu_backward(
        dy, x, weight, bias, mean, rstd, scale, shift, ctx.groups, ctx.silu, x_bias
    )
    return dx, *[None] * 8


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _empty_like(x: Tensor, channels: int | None = None) -> Tensor:
    """Without gaps, in x's memory format; with as many channels as asked for, or as x has."""
    channels = x.shape[1] if channels is None else channels
    shape = (x.shape[0], channels, *x.shape[2:])
    if norm_layout(x, "x").stride_spatial == 1:
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    if x.dim() == 4:
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    moved = (x.shape[0], *x.shape[2:], channels)
    return torch.empty(moved, dtype=x.dtype, device=x.device).movedim(-1, 1)


def _empty_outputs(x: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    statistics = [torch.empty(x.shape[0], groups, dtype=torch.float32, device=x.device) for _ in range(2)]
    return _empty_like(x), statistics[0], statistics[1]


def _in_format_of(dy: Tensor, dx: Tensor) -> Tensor:
    """dy, or residual, copied if it is in another memory format than dx, or in none."""
    with contextlib.suppress(SdaError):
        if (norm_layout(dy, "dy").stride_spatial == 1) == (norm_layout(dx, "dx").stride_spatial == 1):
            return dy
    return torch.empty_like(dx).copy_(dy)


def _vectors(*vectors: Tensor | None) -> list[Tensor | None]:
    """The same with channels side by side, as the kernels read them."""
    return [None if p is None else p if p.stride(-1) == 1 else p.contiguous() for p in vectors]


def _parameters(vectors: list[Tensor | None], groups: int, silu: bool) -> tuple[Any, list[Tensor | None]]:
    """For the C++ version, and the float32 tensors that must outlive its call."""
    alive = [None if p is None else p.float() for p in vectors]
    addresses = [0 if p is None else p.data_ptr() for p in alive]
    strides = [0 if p is None else p.stride(0) for p in alive[2:4]]
    return core().NormParameters(*addresses, *strides, groups, silu), alive


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    x_bias: Tensor | None,
) -> None:
    if x.dim() < 2:
        raise SdaError(f"x has shape {tuple(x.shape)}; pass group_norm_silu [N, C, ...].")
    check_dtype("group_norm_silu", "x", x, *DTYPES)
    images, channels = x.shape[:2]
    if groups < 1 or channels % groups:
        raise SdaError(f"groups is {groups}; choose a number that divides the {channels} channels of x.")
    if eps < 0:
        raise SdaError(f"eps is {eps}; choose one from 0, such as 1e-5.")
    for name, p, shape in (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("scale", scale, (images, channels)),
        ("shift", shift, (images, channels)),
        ("x_bias", x_bias, (channels,)),
    ):
        if p is not None:
            check_shape("group_norm_silu", name, p, shape)
            check_dtype("group_norm_silu", name, p, torch.float32, x.dtype)
            check_device(name, p, x)
    norm_layout(x, "x")


def _check_cotangent(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, groups: int, residual: Tensor | None) -> None:
    for name, like_x in (("dy", dy), ("residual", residual)):
        if like_x is not None and (like_x.shape, like_x.dtype, like_x.device) != (x.shape, x.dtype, x.device):
            raise SdaError(
                f"{name} is {like_x.dtype} {tuple(like_x.shape)} on {like_x.device}; pass it as x is, {x.dtype} "
                f"{tuple(x.shape)} on {x.device}."
            )
    for name, p in (("mean", mean), ("rstd", rstd)):
        if tuple(p.shape) != (x.shape[0], groups) or p.dtype != torch.float32 or p.device != x.device:
            raise SdaError(
                f"{name} is {p.dtype} {tuple(p.shape)} on {p.device}; pass what the forward pass returned, "
                f"torch.float32 {(x.shape[0], groups)} on {x.device}."
            )


def _refuse_gradients(parameters: dict[str, Tensor | None]) -> None:
    for name, p in parameters.items():
        if p is not None and p.requires_grad:
            raise SdaError(
                f"{name} requires a gradient, but group_norm_silu differentiates by x alone; detach {name}, or train "
                "with sda_fast.reference.group_norm_silu.group_norm_silu."
            )
