"""Images in [-1, 1] as bytes in Triton.

    round:    floor(255 ((x + 1) / 2) + 1/2)        truncate: floor(127.5 x + 128)

clamped to 0 .. 255; NaN becomes 0. Shapes: x [N, C, pixels] in any strides, float32, bfloat16 or float16; out uint8
[N, pixels, C] contiguous. Bytes moved: those of x read, one written per element. Sources: torchvision's
`save_image`; the sampler of DiT (Peebles and Xie 2023). Without fused products and sums (`enable_fp_fusion=False`)
the bytes are those of the C++ and the plain version.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 1024
OPTIONS = {"enable_fp_fusion": False}


@triton.jit
def to_uint8_kernel(
    p_out,
    p_x,
    elements,
    chunks,
    channels,
    stride_image,
    stride_channel,
    stride_pixel,
    TRUNCATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program writes BLOCK neighbouring bytes of one image."""
    i_image = tl.program_id(0).to(tl.int64) // chunks
    o_out = (tl.program_id(0) % chunks) * BLOCK + tl.arange(0, BLOCK)
    m_out = o_out < elements
    o_channel = (o_out % channels).to(tl.int64)
    o_pixel = (o_out // channels).to(tl.int64)
    p_image = p_x + i_image * stride_image
    b_x = tl.load(p_image + o_channel * stride_channel + o_pixel * stride_pixel, mask=m_out, other=0.0).to(tl.float32)
    if TRUNCATE:
        level = b_x * 127.5 + 128.0
    else:
        level = (b_x + 1.0) * 0.5 * 255.0 + 0.5
    level = tl.where(level > 0.0, level, 0.0)
    level = tl.where(level < 255.0, level, 255.0)
    tl.store(p_out + i_image * elements + o_out, level.to(tl.int32).to(tl.uint8), mask=m_out)


def to_uint8(out: torch.Tensor, x: torch.Tensor, *, strides: tuple[int, int, int], truncate: bool) -> None:
    """Fills out uint8 [N, H, W, C] from x [N, C, H, W], whose strides over images, channels and pixels are given.

    The caller, `sda_fast.ops.to_uint8`, has checked everything.
    """
    images, channels, height, width = x.shape
    elements = channels * height * width
    chunks = triton.cdiv(elements, BLOCK)
    if images * chunks == 0:
        return
    to_uint8_kernel[(images * chunks,)](
        out, x, elements, chunks, channels, *strides, TRUNCATE=truncate, BLOCK=BLOCK, **OPTIONS
    )


def compilations() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """What is worth compiling ahead: (kernel, signature, constexprs, options)."""
    for dtype in ("fp32", "bf16", "fp16"):
        for truncate in (False, True):
            signature = dict.fromkeys(to_uint8_kernel.arg_names, "i32")
            signature.update(p_out="*u8", p_x=f"*{dtype}")
            yield to_uint8_kernel, signature, dict(TRUNCATE=truncate, BLOCK=BLOCK), OPTIONS
