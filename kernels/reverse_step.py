"""The reverse step of the diffusion in Triton.

    raw     = a x - b eps,  x0 = clamp(raw, -1, 1) where clip
    mean    = c1 x0 + c2 x
    sigma   = noise_scale exp((high + low) / 4 + (high - low) / 4 v); without v: noise_scale exp(high / 2)
    x_{t-1} = mean + sigma z + scale w (a cotangent - b through_network)

Shapes: x, z (given, or drawn here) and x_{t-1} float32 [N, C, pixels], cotangent and through_network the same in the
dtype of out [N, C or 2C, pixels] = eps, v, the last also in float32; all in any strides. w is computed from squares
[N], the coefficients are row position[0] of table [steps, 8]. Bytes moved per element: 8, 4 if noise is given, and
those of out's dtype once for each of eps, v, cotangent and through_network. Source: Ho et al. 2020, algorithm 2; Nichol
and Dhariwal 2021, equation 15; Gao et al. 2023, algorithm 1.

The order of operations is that of csrc/reverse_step.h. Without fused products and sums (`enable_fp_fusion=False`,
always passed) the result has the same bits as the C++ and CUDA versions.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from sda_fast.kernels.philox_normal import philox_normals_of

AXES = ("image", "channel", "pixel")
BLOCK = 256
# One Philox block per thread, two would spill. Denormals are kept in square roots and divisions, as in C++ and CUDA.
OPTIONS = {"enable_fp_fusion": False, "enable_reflect_ftz": False, "num_warps": 8}


@triton.jit
def exponential(x):
    """e^x within 1 ulp (csrc/exponential.h)."""
    x = tl.where(x < -104.0, -104.0, x)
    x = tl.where(x > 89.0, 89.0, x)
    shifted = x * 1.44269504 + 12583166.0
    n = shifted - 12583166.0
    r = x + n * -0.693359375
    r = r + n * 2.12194440e-4
    p = r * 0.001381314463 + 0.008369418856
    p = p * r + 0.04166845679
    p = p * r + 0.1666651479
    p = p * r + 0.4999999305
    y = (r + r * r * p) + 1.0
    # NaN has odd bits here; they stay in range, and y is NaN anyway.
    bits = shifted.to(tl.uint32, bitcast=True)
    half = bits >> 1
    return y * (half << 23).to(tl.float32, bitcast=True) * ((bits - half) << 23).to(tl.float32, bitcast=True)


@triton.jit
def guidance_weight(p_squares, i_image, scale, norm_group, real, JOINT: tl.constexpr):
    """scale w of one image: w = 1 / norm, and zero where the norm is zero."""
    if JOINT:
        i_first = (i_image // norm_group) * norm_group
        square = 0.0
        for k in range(norm_group):
            square += tl.load(p_squares + i_first + k, mask=i_first + k < real, other=0.0)
    else:
        square = norm_group.to(tl.float32) * tl.load(p_squares + i_image, mask=i_image < real, other=0.0)
    norm = tl.sqrt_rn(square)
    return scale * tl.where(norm > 0.0, tl.div_rn(1.0, norm), 0.0)


@triton.jit(do_not_specialize=["seed", "scale", "norm_group", "real", "steps"])
def reverse_step_kernel(
    p_x,
    p_out,
    p_noise,
    p_cotangent,
    p_through_network,
    p_result,
    p_table,
    p_position,
    p_identities,
    p_squares,
    seed,
    scale,
    norm_group,
    real,
    steps,
    channels,
    pixels,
    chunks,
    lanes,
    v_offset,
    x_image,
    x_channel,
    x_pixel,
    out_image,
    out_channel,
    out_pixel,
    noise_image,
    noise_channel,
    noise_pixel,
    cotangent_image,
    cotangent_channel,
    cotangent_pixel,
    through_network_image,
    through_network_channel,
    through_network_pixel,
    result_image,
    result_channel,
    result_pixel,
    LEARNED: tl.constexpr,
    CLIP: tl.constexpr,
    DRAWN: tl.constexpr,
    GUIDED: tl.constexpr,
    JOINT: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program makes 4 BLOCK elements of one image. FLAT: every image of every tensor is contiguous.

    Else neighbouring threads take neighbouring elements of channels_last; where noise is drawn, the same four pixels
    of `lanes` neighbouring channels, which is 1 where a Philox block may straddle two. v lies v_offset behind eps.
    """
    i_image = tl.program_id(0).to(tl.int64) // chunks
    i_first = (tl.program_id(0) % chunks) * BLOCK
    i_block = i_first + tl.arange(0, BLOCK)
    if FLAT or not DRAWN:
        o_element = i_first * 4 + tl.arange(0, 4 * BLOCK)
        m_element = o_element < channels * pixels
    else:
        block = (i_block % lanes) * (pixels // 4) + i_block // lanes
        i_block = tl.where(i_block * 4 < channels * pixels, block, i_block)  # no second writer beyond the end
        o_first = i_block * 4
        o_element = tl.interleave(tl.interleave(o_first, o_first + 2), tl.interleave(o_first + 1, o_first + 3))
        m_element = o_element < channels * pixels
    if FLAT:
        channel = tl.zeros_like(o_element).to(tl.int64)
        pixel = o_element.to(tl.int64)
    else:
        if DRAWN:
            channel = (o_element // pixels).to(tl.int64)
            pixel = (o_element % pixels).to(tl.int64)
        else:
            channel = (o_element % channels).to(tl.int64)
            pixel = (o_element // channels).to(tl.int64)

    i_step = tl.load(p_position)
    m_step = (i_step >= 0) & (i_step < steps)
    p_row = p_table + i_step * 8
    a = tl.load(p_row, mask=m_step, other=float("nan"))
    b = tl.load(p_row + 1, mask=m_step, other=float("nan"))
    c1 = tl.load(p_row + 2, mask=m_step, other=float("nan"))
    c2 = tl.load(p_row + 3, mask=m_step, other=float("nan"))
    low = tl.load(p_row + 4, mask=m_step, other=float("nan"))
    high = tl.load(p_row + 5, mask=m_step, other=float("nan"))
    noise_scale = tl.load(p_row + 6, mask=m_step, other=float("nan"))

    b_x = tl.load(p_x + i_image * x_image + channel * x_channel + pixel * x_pixel, mask=m_element)
    p_eps = p_out + i_image * out_image + channel * out_channel + pixel * out_pixel
    raw = a * b_x - b * tl.load(p_eps, mask=m_element).to(tl.float32)
    if CLIP:
        raw = tl.where(raw < -1.0, -1.0, raw)
        raw = tl.where(raw > 1.0, 1.0, raw)
    mean = c1 * raw + c2 * b_x

    if LEARNED:
        b_v = tl.load(p_eps + v_offset, mask=m_element).to(tl.float32)
        sigma = noise_scale * exponential((high + low) * 0.25 + (high - low) * 0.25 * b_v)
    else:
        sigma = noise_scale * exponential(high * 0.5)
    if DRAWN:
        n0, n1, n2, n3 = philox_normals_of(
            seed, i_block.to(tl.int64), tl.load(p_position + 1) & 0xFFFFFFFF, tl.load(p_identities + i_image)
        )
        b_noise = tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
    else:
        p_z = p_noise + i_image * noise_image + channel * noise_channel + pixel * noise_pixel
        b_noise = tl.load(p_z, mask=m_element)
    b_result = tl.where(noise_scale != 0.0, mean + sigma * b_noise, mean)

    if GUIDED:
        weight = guidance_weight(p_squares, i_image, scale, norm_group, real, JOINT)
        p_c = p_cotangent + i_image * cotangent_image + channel * cotangent_channel + pixel * cotangent_pixel
        p_t = p_through_network + i_image * through_network_image
        p_t = p_t + channel * through_network_channel + pixel * through_network_pixel
        b_cotangent = tl.load(p_c, mask=m_element).to(tl.float32)
        b_through_network = tl.load(p_t, mask=m_element).to(tl.float32)
        b_result = b_result + weight * (a * b_cotangent - b * b_through_network)
    p_y = p_result + i_image * result_image + channel * result_channel + pixel * result_pixel
    tl.store(p_y, b_result, mask=m_element)


def reverse_step(
    tensors: dict[str, torch.Tensor | None],
    strides: dict[str, tuple[int, int, int]],
    *,
    table: torch.Tensor,
    position: torch.Tensor,
    identities: torch.Tensor | None,
    squares: torch.Tensor | None,
    seed: int,
    clip: bool,
    scale: float,
    joint: bool,
    norm_group: int,
    real: int,
) -> None:
    """Fills tensors["result"] from "x", "out", "noise", "cotangent" and "through_network", of which the last three may
    be None; `strides` over images, channels and pixels of each; seed is a signed 64-bit pattern.

    The caller, `sda_fast.ops.reverse_step`, has checked everything.
    """
    x, out = tensors["x"], tensors["out"]
    images, channels, height, width = x.shape
    pixels = height * width
    chunks = triton.cdiv(channels * pixels, 4 * BLOCK)
    if images * chunks == 0:
        return
    reverse_step_kernel[(images * chunks,)](
        **{f"p_{name}": tensor for name, tensor in tensors.items()},
        **{f"{name}_{axis}": s for name in tensors for axis, s in zip(AXES, strides[name], strict=True)},
        p_table=table,
        p_position=position,
        p_identities=identities,
        p_squares=squares,
        seed=seed,
        scale=scale,
        norm_group=norm_group,
        real=real,
        steps=len(table),
        channels=channels,
        pixels=pixels,
        chunks=chunks,
        lanes=channels if pixels % 4 == 0 else 1,
        v_offset=channels * strides["out"][1],
        LEARNED=out.shape[1] > channels,
        CLIP=clip,
        DRAWN=tensors["noise"] is None,
        GUIDED=tensors["cotangent"] is not None,
        JOINT=joint,
        FLAT=all(tensors[name] is None or strides[name][1:] == (pixels, 1) for name in tensors),
        BLOCK=BLOCK,
        **OPTIONS,
    )


def compilations() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """What is worth compiling ahead: (kernel, signature, constexprs, options)."""
    for dtype in ("fp32", "bf16", "fp16"):
        for flat in (True, False):
            for drawn in (True, False):
                for guided in (True, False) if dtype == "bf16" else (True,):
                    yield _compilation(dtype, flat, drawn, guided)


def _compilation(
    dtype: str, flat: bool, drawn: bool, guided: bool
) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]:
    signature = dict.fromkeys(reverse_step_kernel.arg_names, "i32")
    signature.update(dict.fromkeys(("p_x", "p_noise", "p_result", "p_table", "p_squares"), "*fp32"))
    signature.update(dict.fromkeys(("p_out", "p_cotangent", "p_through_network"), f"*{dtype}"))
    signature.update(p_position="*i64", p_identities="*i64", seed="i64", scale="fp32")
    constexprs: dict[str, Any] = dict(
        LEARNED=guided, CLIP=guided, DRAWN=drawn, GUIDED=guided, JOINT=guided and flat, FLAT=flat, BLOCK=BLOCK
    )
    absent = ["p_noise"] if drawn else ["p_identities"]
    absent += [] if guided else ["p_cotangent", "p_through_network", "p_squares"]
    constexprs.update(dict.fromkeys(absent))
    return reverse_step_kernel, signature, constexprs, OPTIONS
