"""DiT's adaptive layer norm and gated residual in Triton, one pass over memory each.

    modulate:       out = (x - mean) / sqrt(var + eps) * (1 + scale) + shift, mean and variance over C
    gate_residual:  out = x + gate * y

Shapes: x, y, out [N, T, C], shift, scale, gate [N, C], each float32, bfloat16 or float16; inside float32.
Bytes moved, with E bytes per element: modulate 2 N T C E, gate_residual 3 N T C E; rows [N, C] come from the cache.
Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023, section 3.2.

A program holds one token in registers, in two parts: the largest power of two in C and the power of two that covers
the rest. The widths of all DiT models (384, 768, 1024, 1152) are such sums, so no lane is idle; up to C = 2047 a token
is one warp, whose sums need no shared memory. The variance is taken around the mean.

The order of a sum follows from the layout of a program's threads, and that from what the compiler knows of alignment.
So C is a constant, no other number is specialised, and strides count groups of VECTOR elements: an image's result
cannot depend on the batch around it.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def load_part(p_row, FIRST: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr):
    """Channels FIRST .. FIRST + SIZE - 1 of a row, float32 [SIZE]; zero beyond C."""
    c = FIRST + tl.arange(0, SIZE)
    return tl.load(p_row + c, mask=c < C, other=0.0).to(tl.float32)


@triton.jit
def store_part(p_row, b_out, FIRST: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr):
    c = FIRST + tl.arange(0, SIZE)
    tl.store(p_row + c, b_out.to(p_row.dtype.element_ty), mask=c < C)


@triton.jit
def modulate_part(p_out, p_shift, p_scale, b_normalised, FIRST: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr):
    b_scale = load_part(p_scale, FIRST, SIZE, C)
    b_shift = load_part(p_shift, FIRST, SIZE, C)
    store_part(p_out, b_normalised * (1.0 + b_scale) + b_shift, FIRST, SIZE, C)


@triton.jit(do_not_specialize=["tokens", "x_image", "x_token", "shift_image", "scale_image"])
def modulate_kernel(
    p_out,
    p_x,
    p_shift,
    p_scale,
    eps,
    tokens,
    x_image,
    x_token,
    shift_image,
    scale_image,
    C: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One program normalises one token; p_out is contiguous."""
    i_row = tl.program_id(0).to(tl.int64)
    i_image, i_token = i_row // tokens, i_row % tokens
    p_out += i_row * C
    p_x += (i_image * x_image + i_token * x_token) * VECTOR
    p_shift += i_image * shift_image * VECTOR
    p_scale += i_image * scale_image * VECTOR
    b_head = load_part(p_x, 0, HEAD, C)
    total = tl.sum(b_head, 0)
    if TAIL:
        b_tail = load_part(p_x, HEAD, TAIL, C)
        total += tl.sum(b_tail, 0)
    mean = total / C
    b_head -= mean
    squares = tl.sum(b_head * b_head, 0)
    if TAIL:
        b_tail = tl.where(HEAD + tl.arange(0, TAIL) < C, b_tail - mean, 0.0)
        squares += tl.sum(b_tail * b_tail, 0)
    rstd = 1.0 / tl.sqrt_rn(squares / C + eps)
    modulate_part(p_out, p_shift, p_scale, b_head * rstd, 0, HEAD, C)
    if TAIL:
        modulate_part(p_out, p_shift, p_scale, b_tail * rstd, HEAD, TAIL, C)


@triton.jit
def gate_part(p_out, p_x, p_gate, p_y, FIRST: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr):
    b_x = load_part(p_x, FIRST, SIZE, C)
    b_y = load_part(p_y, FIRST, SIZE, C)
    store_part(p_out, b_x + load_part(p_gate, FIRST, SIZE, C) * b_y, FIRST, SIZE, C)


@triton.jit(do_not_specialize=["tokens", "x_image", "x_token", "gate_image", "y_image", "y_token"])
def gate_residual_kernel(
    p_out,
    p_x,
    p_gate,
    p_y,
    tokens,
    x_image,
    x_token,
    gate_image,
    y_image,
    y_token,
    C: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One program adds one token, without fused products and sums, so with the plain version's bits."""
    i_row = tl.program_id(0).to(tl.int64)
    i_image, i_token = i_row // tokens, i_row % tokens
    p_out += i_row * C
    p_x += (i_image * x_image + i_token * x_token) * VECTOR
    p_gate += i_image * gate_image * VECTOR
    p_y += (i_image * y_image + i_token * y_token) * VECTOR
    gate_part(p_out, p_x, p_gate, p_y, 0, HEAD, C)
    if TAIL:
        gate_part(p_out, p_x, p_gate, p_y, HEAD, TAIL, C)


def modulate(out: torch.Tensor, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> None:
    """Fills out, contiguous. `sda_fast.ops.modulate` has checked everything and aligned what can be."""
    images, tokens, channels = x.shape
    constexprs, options = tiling(channels)
    strides = [stride // constexprs["VECTOR"] for stride in (*x.stride()[:2], shift.stride(0), scale.stride(0))]
    if images * tokens:
        modulate_kernel[(images * tokens,)](out, x, shift, scale, eps, tokens, *strides, **constexprs, **options)


def gate_residual(out: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> None:
    """Fills out, contiguous. `sda_fast.ops.modulate` has checked everything and aligned what can be."""
    images, tokens, channels = x.shape
    constexprs, options = tiling(channels)
    strides = [stride // constexprs["VECTOR"] for stride in (*x.stride()[:2], gate.stride(0), *y.stride()[:2])]
    if images * tokens:
        gate_residual_kernel[(images * tokens,)](out, x, gate, y, tokens, *strides, **constexprs, **options)


def tiling(channels: int) -> tuple[dict[str, int], dict[str, Any]]:
    """(constexprs, launch options) of both kernels: a function of C alone."""
    head = 1 << (channels.bit_length() - 1)
    tail = triton.next_power_of_2(channels - head) if channels > head else 0
    vector = 8 if channels % 8 == 0 else 1  # elements: 16 bytes, or twice that
    per_thread = 32 if vector > 1 else 16  # every element read alone has an address of its own
    constexprs = {"C": channels, "HEAD": head, "TAIL": tail, "VECTOR": vector}
    return constexprs, {"num_warps": max(1, head // (32 * per_thread)), "enable_fp_fusion": False}


def compilations() -> Iterator[tuple[Any, dict[str, str], dict[str, int], dict[str, Any]]]:
    """(kernel, signature, constexprs, options) of representative specialisations; ":16" is an aligned pointer."""
    for channels, dtypes in {
        72: ("bf16",),
        1152: ("fp32", "bf16", "fp16"),
        2047: ("fp32", "fp16"),
        8184: ("fp32", "bf16"),
        8192: ("bf16",),
    }.items():
        constexprs, options = tiling(channels)
        for dtype in dtypes:
            for kernel in (modulate_kernel, gate_residual_kernel):
                arguments = [name for name in kernel.arg_names if name not in constexprs]
                signature = {name: f"*{dtype}:16" if name.startswith("p_") else "i32" for name in arguments}
                if kernel is modulate_kernel:
                    signature["eps"] = "fp32"
                yield kernel, signature, constexprs, options
