"""Adaptive layer norm and gated residual of DiT, each in one pass over memory.

There are a Triton and a plain version of both. C++ is absent because on the CPU PyTorch's own vectorised layer norm and
elementwise operations serve (a DiT is a few per cent of the work there), CUDA because each operator is a single
pass over rows, which Triton expresses fully.
"""

from typing import Any

import torch
from torch import Tensor

from sda_fast.errors import SdaError
from sda_fast.ops._backend import on_device_of, select
from sda_fast.ops._checks import DTYPES, check_device, check_dtype, check_shape
from sda_fast.ops._layout import wrong_strides
from sda_fast.reference import modulate as plain

VERSIONS = ("triton", "plain")
MAX_CHANNELS = 8192  # a row is held in registers


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, dtype: torch.dtype | None = None) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift per token, the norm over C and without affine, in `dtype`, contiguous.

    The adaLN of DiT (Peebles and Xie 2023, section 3.2), computed in float32 with the variance taken around
    the mean. Differentiable.

    x: [N, T, C] float32, bfloat16 or float16, C from 1 to 8192; each token contiguous, any other strides.
    shift, scale: [N, C] in one of these dtypes each; each row contiguous, so chunks of [N, 6 C] are fine.
    dtype: one of these too, by default x's.

    Raises SdaError for a wrong shape, dtype, device or stride.
    """
    return torch.ops.sda_fast.modulate(x, shift, scale, eps, dtype)


def gate_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate y, computed in float32, in x's dtype, contiguous: the end of each half of a DiT block. Differentiable.

    x, y: [N, T, C] in float32, bfloat16 or float16 each, C from 1 to 8192; each token contiguous, any other strides.
    gate: [N, C] in one of these dtypes; each row contiguous, so a chunk of [N, 6 C] is fine.

    Raises SdaError for a wrong shape, dtype, device or stride.
    """
    return torch.ops.sda_fast.gate_residual(x, gate, y)


@torch.library.custom_op("sda_fast::modulate", mutates_args=())
def _modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    _check("modulate", x, {"shift": shift, "scale": scale}, dtype=dtype)
    if select("modulate", x.device, VERSIONS) == "plain":
        return plain.modulate(x, shift, scale, eps, dtype).contiguous()
    from sda_fast.kernels import modulate as kernel

    out = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    with on_device_of(x):
        kernel.modulate(out, _aligned(x), _aligned(shift), _aligned(scale), eps)
    return out


@_modulate.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    _check("modulate", x, {"shift": shift, "scale": scale}, dtype=dtype)
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


@torch.library.custom_op("sda_fast::gate_residual", mutates_args=())
def _gate_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    _check("gate_residual", x, {"gate": gate}, y)
    if select("gate_residual", x.device, VERSIONS) == "plain":
        return plain.gate_residual(x, gate, y).contiguous()
    from sda_fast.kernels import modulate as kernel

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with on_device_of(x):
        kernel.gate_residual(out, _aligned(x), _aligned(gate), _aligned(y))
    return out


@_gate_residual.register_fake
def _(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    _check("gate_residual", x, {"gate": gate}, y)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


# The gradients are plain torch: they serve training, where no operator of ours is in a hurry.


def _keep_modulate(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float, torch.dtype | None], output: Tensor) -> None:
    *tensors, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors)


def _modulate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    x, shift, scale = ctx.saved_tensors
    wide, grad, wide_scale = plain.widen(x, grad, scale)
    variance, mean = torch.var_mean(wide, dim=-1, correction=0, keepdim=True)
    rstd = (variance + ctx.eps).rsqrt()
    normalised = (wide - mean) * rstd
    inner = grad * (1 + wide_scale[:, None])
    along = (inner * normalised).mean(-1, keepdim=True)
    dx = rstd * (inner - inner.mean(-1, keepdim=True) - normalised * along)
    return dx.to(x.dtype), grad.sum(1).to(shift.dtype), (grad * normalised).sum(1).to(scale.dtype), None, None


def _keep_gate_residual(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    _, gate, y = inputs
    ctx.save_for_backward(gate, y)


def _gate_residual_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate, y = ctx.saved_tensors
    wide, wide_gate, wide_y = plain.widen(grad, gate, y)
    return grad, (wide * wide_y).sum(1).to(gate.dtype), (wide * wide_gate[:, None]).to(y.dtype)


_modulate.register_autograd(_modulate_backward, setup_context=_keep_modulate)
_gate_residual.register_autograd(_gate_residual_backward, setup_context=_keep_gate_residual)


def _check(
    op: str, x: Tensor, rows: dict[str, Tensor], y: Tensor | None = None, dtype: torch.dtype | None = None
) -> None:
    if dtype not in (None, *DTYPES):
        raise SdaError(f"dtype is {dtype}; {op} gives {', '.join(map(str, DTYPES))}.")
    if x.dim() != 3 or not 1 <= x.shape[2] <= MAX_CHANNELS:
        raise SdaError(f"x has shape {tuple(x.shape)}; pass {op} tokens [N, T, C] with C from 1 to {MAX_CHANNELS}.")
    images, _, channels = x.shape
    expected = {"x": (x, x.shape), **{name: (row, (images, channels)) for name, row in rows.items()}}
    if y is not None:
        expected["y"] = (y, x.shape)
    for name, (tensor, shape) in expected.items():
        check_shape(op, name, tensor, shape)
        check_dtype(op, name, tensor, *DTYPES)
        check_device(name, tensor, x)
        if channels > 1 and tensor.numel() and tensor.stride(-1) != 1:
            raise wrong_strides(tensor, name, "its channels must lie side by side")


def _aligned(x: Tensor) -> Tensor:
    """x where the kernels may read it: where C is a multiple of 8 they take 16 bytes at a time, from anywhere else
    one element. That must not depend on where a tensor happens to lie, or sums would be taken in another order."""
    if x.shape[-1] % 8 or (x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:-1])):
        return x
    return x.clone(memory_format=torch.contiguous_format)
