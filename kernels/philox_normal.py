"""Counter-based normal noise in Triton.

    words   = Philox4x32-10(key = seed, counter = (block, step, identity_lo, identity_hi))
    u(w)    = ((w >> 9) + 1/2) 2^-23
    normals = sqrt(-2 ln u(w0)) (cos, sin)(2 pi u(w1)), and the same with w2, w3

are elements 4 block .. 4 block + 3 of an image in logical C order. Shapes: out float32 [N, outer, inner]
in any strides, identities int64 [N]. Bytes moved: 4 written per element. Source: Salmon, Moraes, Dror and
Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

The polynomials are those of csrc/philox.h, in the same order of operations. Without fused products and sums
(`enable_fp_fusion=False`, always passed) the result has the same bits as the C++ and CUDA versions.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 256


@triton.jit
def log_unit(u):
    """ln u for u in [2^-24, 1)."""
    shifted = u.to(tl.int32, bitcast=True) - 0x3F3504F3
    e = (shifted >> 23).to(tl.float32)
    f = ((shifted & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = f * -0.0763450292 + 0.1276157735
    p = p * f - 0.1316018046
    p = p * f + 0.14201758
    p = p * f - 0.1662335754
    p = p * f + 0.2000122687
    p = p * f - 0.2500082103
    p = p * f + 0.3333333171
    square = f * f
    tail = square * f * p
    tail = tail + e * -2.12194440e-4
    tail = tail + square * -0.5
    return (f + tail) + e * 0.693359375


@triton.jit
def cos_sin_turns(w):
    """cos and sin of 2 pi u(w), reduced exactly to [-1/8, 1/8] turns."""
    k = (w >> 9).to(tl.int32)
    quadrant = (k + (1 << 20)) >> 21
    turns = ((k - (quadrant << 21)).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    z = turns * turns
    p = z * -75.45339669 + 81.59393696
    p = p * z - 41.34167316
    s = turns * (p * z + 6.283185307)
    q = z * 59.24596395 - 85.44374172
    q = q * z + 64.93932647
    q = q * z - 19.73920869
    c = q * z + 1.0
    swap = (quadrant & 1) != 0
    cosine = tl.where(swap, s, c)
    sine = tl.where(swap, c, s)
    return tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine), tl.where((quadrant & 2) != 0, -sine, sine)


@triton.jit
def box_muller(w_radius, w_angle):
    """Two normals of two words."""
    u = ((w_radius >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    radius = tl.sqrt_rn(log_unit(u) * -2.0)
    cosine, sine = cos_sin_turns(w_angle)
    return radius * cosine, radius * sine


@triton.jit
def philox_words_of(seed, block, step, identity):
    """The four words of every block (int64 tensor); seed and identity are 64-bit patterns, step has 32."""
    zero = (block * 0).to(tl.uint32)
    c1 = zero + step.to(tl.uint32)
    c2 = zero + (identity & 0xFFFFFFFF).to(tl.uint32)
    c3 = zero + ((identity >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, block.to(tl.uint32), c1, c2, c3, 10)


@triton.jit
def philox_normals_of(seed, block, step, identity):
    """The four normals of every block (int64 tensor): elements 4 block .. 4 block + 3."""
    w0, w1, w2, w3 = philox_words_of(seed, block, step, identity)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return n0, n1, n2, n3


@triton.jit(do_not_specialize=["seed", "step"])
def philox_normal_kernel(
    p_out,
    p_identities,
    seed,
    step,
    elements,
    chunks,
    inner,
    lanes,
    stride_image,
    stride_outer,
    stride_inner,
    CONTIGUOUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program draws BLOCK Philox blocks of one image.

    Of an image that is not contiguous, neighbouring threads take the same four inner positions of `lanes`
    neighbouring outer ones, so that channels_last writes land side by side; lanes is 1 where a block may
    straddle two outer positions.
    """
    i_image = tl.program_id(0).to(tl.int64) // chunks
    i_first = (tl.program_id(0).to(tl.int64) % chunks) * BLOCK
    i_thread = i_first + tl.arange(0, BLOCK)
    if CONTIGUOUS:
        block = i_thread
    else:
        block = (i_thread % lanes) * (inner // 4) + i_thread // lanes
        block = tl.where(i_thread * 4 < elements, block, i_thread)  # no second writer beyond the end
    n0, n1, n2, n3 = philox_normals_of(seed, block, step, tl.load(p_identities + i_image))
    b_out = tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
    if CONTIGUOUS:
        o_element = i_first * 4 + tl.arange(0, 4 * BLOCK)
        o_out = o_element
    else:
        o_first = block * 4
        o_element = tl.interleave(tl.interleave(o_first, o_first + 2), tl.interleave(o_first + 1, o_first + 3))
        o_out = (o_element // inner) * stride_outer + (o_element % inner) * stride_inner
    tl.store(p_out + i_image * stride_image + o_out, b_out, mask=o_element < elements)


@triton.jit(do_not_specialize=["seed", "step", "first_block"])
def philox_words_kernel(p_out, p_identities, seed, step, first_block, blocks, chunks, BLOCK: tl.constexpr):
    """The raw words, for tests: one program draws BLOCK Philox blocks of one image."""
    i_image = tl.program_id(0).to(tl.int64) // chunks
    i_block = (tl.program_id(0).to(tl.int64) % chunks) * BLOCK + tl.arange(0, BLOCK)
    w0, w1, w2, w3 = philox_words_of(seed, i_block + first_block, step, tl.load(p_identities + i_image))
    m_block = i_block < blocks
    p_row = p_out + (i_image * blocks + i_block) * 4
    tl.store(p_row, w0.to(tl.int32, bitcast=True), mask=m_block)
    tl.store(p_row + 1, w1.to(tl.int32, bitcast=True), mask=m_block)
    tl.store(p_row + 2, w2.to(tl.int32, bitcast=True), mask=m_block)
    tl.store(p_row + 3, w3.to(tl.int32, bitcast=True), mask=m_block)


def philox_normal(
    out: torch.Tensor, identities: torch.Tensor, *, seed: int, step: int, layout: tuple[int, ...]
) -> None:
    """Fills out, float32, with the noise of identities int64 [N]; seed is a signed 64-bit pattern.

    `layout` is (images, outer, inner, stride_image, stride_outer, stride_inner) of out, in elements. The
    caller, `sda_fast.ops.philox_normal`, has checked everything.
    """
    images, outer, inner, *strides = layout
    chunks = triton.cdiv(outer * inner, 4 * BLOCK)
    if images * chunks == 0:
        return
    lanes = outer if inner % 4 == 0 else 1
    philox_normal_kernel[(images * chunks,)](
        out,
        identities,
        seed,
        step,
        outer * inner,
        chunks,
        inner,
        lanes,
        *strides,
        CONTIGUOUS=outer == 1 and strides[-1] == 1,
        BLOCK=BLOCK,
        enable_fp_fusion=False,
    )


def philox_words(out: torch.Tensor, identities: torch.Tensor, *, seed: int, step: int, first_block: int) -> None:
    """The raw words, for tests: out int32 [N, blocks, 4], contiguous, identities int64 [N]."""
    images, blocks, _ = out.shape
    chunks = triton.cdiv(blocks, BLOCK)
    if images * chunks == 0:
        return
    philox_words_kernel[(images * chunks,)](
        out, identities, seed, step, first_block, blocks, chunks, BLOCK=BLOCK, enable_fp_fusion=False
    )


def compilations() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(kernel, signature, constexprs, options) of every specialisation; ":16" is an aligned pointer."""
    words = dict.fromkeys(philox_words_kernel.arg_names[:-1], "i32")
    words |= {"p_out": "*i32:16", "p_identities": "*i64:16", "seed": "i64", "step": "i64", "first_block": "i64"}
    options = {"enable_fp_fusion": False}
    yield philox_words_kernel, words, {"BLOCK": BLOCK}, options
    normal = dict.fromkeys(philox_normal_kernel.arg_names[:-2], "i32")
    normal |= {"p_out": "*fp32:16", "p_identities": "*i64:16", "seed": "i64", "step": "i64"}
    for contiguous in (True, False):
        constexprs = {"CONTIGUOUS": contiguous, "BLOCK": BLOCK}
        yield philox_normal_kernel, normal, constexprs, options
