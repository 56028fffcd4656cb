"""The derivative of GroupNorm, scale and shift per image and SiLU by x, in Triton.

    dx = A du + K (x - mean) + M,   du = dy sigmoid(u) (1 + u (1 - sigmoid(u)))
    K  = -rstd^2 / m  sum A du (x - mean),   M = -1 / m  sum A du

with u, A and x of `group_norm_silu` and the sums over the m elements of a group; plus a residual, if there is one. u is
computed anew from x and the statistics, twice. Shapes: dy, x, dx, residual [N, C, S], contiguous or channels_last,
mean, rstd, K, M float32 [N, groups]. Bytes moved: dy and x twice, dx and residual once. Source: the chain rule for Wu
and He, "Group normalization", 2018, equations 1 to 3.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from sda_fast.kernels._norm_plan import (
    MERGE_OPTIONS,
    aligned,
    compilations_of,
    cut_of,
    options_of,
    strides_of,
)
from sda_fast.kernels._norm_tiles import (
    across,
    affine_of,
    channels_of,
    image_of,
    jit,
    last_first,
    load_x,
    offsets_of,
    place_of,
    raise_of,
    split_of,
    sum_groups,
)

TILE = 2048  # elements of each of the two tensors that are read


@triton.jit
def through_silu(dy, u, SILU: tl.constexpr):
    """dy times the derivative of SiLU at u."""
    if SILU:
        sigmoid = 1.0 / (1.0 + tl.exp(-u))
        dy = dy * (sigmoid * (1.0 + u * (1.0 - sigmoid)))
    return dy


@jit
def sums_kernel(
    p_dy,
    p_x,
    p_parts,
    p_mean,
    p_rstd,
    p_weight,
    p_bias,
    p_scale,
    p_shift,
    p_x_bias,
    spatial,
    splits,
    per_split,
    stride_dy,
    stride_x,
    pitch_dy,
    pitch_x,
    stride_scale,
    stride_shift,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The sums of A du and of A du (x - mean) of a split of a group: p_parts float32 [N, slots, 2, GROUPS]."""
    i_block, i_split, i_image = place_of(tl.program_id(0), splits, GROUPS, SIZE, PARTS, BLOCK_C)
    IN_BLOCK: tl.constexpr = 1 if PARTS > 1 else BLOCK_C // triton.next_power_of_2(SIZE)
    channel, i_group, m_channel = channels_of(i_block, GROUPS, SIZE, PARTS, BLOCK_C)
    mean, slope, offset = affine_of(
        p_mean,
        p_rstd,
        p_weight,
        p_bias,
        p_scale,
        p_shift,
        stride_scale,
        stride_shift,
        i_image,
        i_group,
        channel,
        m_channel,
        GROUPS,
    )
    raised = None
    if p_x_bias is not None:
        raised = across(raise_of(p_x_bias, channel, m_channel), CHANNELS_LAST)
    p_cotangent = image_of(p_dy, i_image, stride_dy, VECTOR)
    p_from = image_of(p_x, i_image, stride_x, VECTOR)
    first, rows = split_of(i_split, per_split, spatial, CHANNELS_LAST, VECTOR)
    within = tl.arange(0, BLOCK_S)
    if CHANNELS_LAST:
        sums = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    else:
        sums = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    moments = sums
    for start in range(0, rows, BLOCK_S):
        position = first + start + within
        m_tile = across(m_channel, CHANNELS_LAST) & across(start + within < rows, not CHANNELS_LAST)
        o_dy = offsets_of(channel, position, pitch_dy, CHANNELS_LAST, VECTOR)
        o_x = offsets_of(channel, position, pitch_x, CHANNELS_LAST, VECTOR)
        b_dy = tl.load(p_cotangent + o_dy, mask=m_tile, other=0.0).to(tl.float32)
        b_x = load_x(p_from + o_x, m_tile, raised)
        d = b_x - across(mean, CHANNELS_LAST)
        du = through_silu(b_dy, d * across(slope, CHANNELS_LAST) + across(offset, CHANNELS_LAST), SILU)
        du = du * across(slope, CHANNELS_LAST)  # zero where the mask is: dy is zero there
        sums += du
        moments += du * d
    o_group = i_block // PARTS * IN_BLOCK + tl.arange(0, IN_BLOCK)
    p_slot = p_parts + ((i_image * splits + i_split) * PARTS + i_block % PARTS) * (2 * GROUPS) + o_group
    tl.store(p_slot, sum_groups(sums, CHANNELS_LAST, IN_BLOCK, BLOCK_C), mask=o_group < GROUPS)
    tl.store(p_slot + GROUPS, sum_groups(moments, CHANNELS_LAST, IN_BLOCK, BLOCK_C), mask=o_group < GROUPS)


@jit
def finish_sums_kernel(
    p_parts,
    p_rstd,
    p_pull,
    p_drift,
    spatial,
    slots,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """K and M of one group of one image from its slots."""
    i = tl.program_id(0).to(tl.int64)
    i_slot = tl.arange(0, SLOTS)
    p_slot = p_parts + (i // GROUPS * slots + i_slot) * (2 * GROUPS) + i % GROUPS
    count = SIZE * spatial.to(tl.float32)
    total = tl.sum(tl.load(p_slot, mask=i_slot < slots, other=0.0)) / count
    moment = tl.sum(tl.load(p_slot + GROUPS, mask=i_slot < slots, other=0.0)) / count
    rstd = tl.load(p_rstd + i)
    tl.store(p_pull + i, -(rstd * moment) * rstd)
    tl.store(p_drift + i, -total)


@jit
def gradient_kernel(
    p_dy,
    p_x,
    p_dx,
    p_rest,
    p_residual,
    p_pull,
    p_drift,
    p_mean,
    p_rstd,
    p_weight,
    p_bias,
    p_scale,
    p_shift,
    p_x_bias,
    spatial,
    splits,
    per_split,
    stride_dy,
    stride_x,
    stride_dx,
    stride_rest,
    stride_residual,
    pitch_dy,
    pitch_x,
    pitch_dx,
    pitch_rest,
    pitch_residual,
    stride_scale,
    stride_shift,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dx, plus the residual, of one split of a block of channels. Those from FIRST on go to p_rest, if there is one."""
    i_block, i_split, i_image = place_of(last_first(), splits, GROUPS, SIZE, PARTS, BLOCK_C)
    channel, i_group, m_channel = channels_of(i_block, GROUPS, SIZE, PARTS, BLOCK_C)
    mean, slope, offset = affine_of(
        p_mean,
        p_rstd,
        p_weight,
        p_bias,
        p_scale,
        p_shift,
        stride_scale,
        stride_shift,
        i_image,
        i_group,
        channel,
        m_channel,
        GROUPS,
    )
    o_group = i_image * GROUPS + i_group
    pull = tl.load(p_pull + o_group, mask=m_channel, other=0.0)
    drift = tl.load(p_drift + o_group, mask=m_channel, other=0.0)
    raised = None
    if p_x_bias is not None:
        raised = across(raise_of(p_x_bias, channel, m_channel), CHANNELS_LAST)
    p_cotangent = image_of(p_dy, i_image, stride_dy, VECTOR)
    p_from = image_of(p_x, i_image, stride_x, VECTOR)
    p_to = image_of(p_dx, i_image, stride_dx, VECTOR)
    if p_rest is not None:
        p_to_rest = image_of(p_rest, i_image, stride_rest, VECTOR)
        m_first = across(channel < FIRST, CHANNELS_LAST)
    if p_residual is not None:
        p_added = image_of(p_residual, i_image, stride_residual, VECTOR)
    first, rows = split_of(i_split, per_split, spatial, CHANNELS_LAST, VECTOR)
    within = tl.arange(0, BLOCK_S)
    for start in range(0, rows, BLOCK_S):
        position = first + start + within
        m_tile = across(m_channel, CHANNELS_LAST) & across(start + within < rows, not CHANNELS_LAST)
        o_dy = offsets_of(channel, position, pitch_dy, CHANNELS_LAST, VECTOR)
        o_x = offsets_of(channel, position, pitch_x, CHANNELS_LAST, VECTOR)
        o_dx = offsets_of(channel, position, pitch_dx, CHANNELS_LAST, VECTOR)
        b_dy = tl.load(p_cotangent + o_dy, mask=m_tile, other=0.0).to(tl.float32)
        b_x = load_x(p_from + o_x, m_tile, raised)
        d = b_x - across(mean, CHANNELS_LAST)
        du = through_silu(b_dy, d * across(slope, CHANNELS_LAST) + across(offset, CHANNELS_LAST), SILU)
        b_dx = across(slope, CHANNELS_LAST) * du + (across(pull, CHANNELS_LAST) * d + across(drift, CHANNELS_LAST))
        if p_residual is not None:
            o_added = offsets_of(channel, position, pitch_residual, CHANNELS_LAST, VECTOR)
            b_dx += tl.load(p_added + o_added, mask=m_tile, other=0.0).to(tl.float32)
        b_dx = b_dx.to(p_dx.dtype.element_ty)
        if p_rest is not None:
            o_rest = offsets_of(channel - FIRST, position, pitch_rest, CHANNELS_LAST, VECTOR)
            tl.store(p_to + o_dx, b_dx, mask=m_tile & m_first)
            tl.store(p_to_rest + o_rest, b_dx, mask=m_tile & (m_first == 0))
        else:
            tl.store(p_to + o_dx, b_dx, mask=m_tile)


def group_norm_silu_backward(
    read: Sequence[torch.Tensor],
    parts: Sequence[torch.Tensor],
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    *,
    silu: bool,
    layouts: Sequence[Sequence[tuple[int, ...]]],
) -> None:
    """Writes dx, the gradient plus the residual; `layouts` are those of `read` and of `parts`.

    read: dy, x, and the residual if there is one. parts: dx, or its first and its other channels, numbers of which that
    a 16-byte access divides.
    """
    nothing = (None, 0, 0)
    where_x = layouts[0][1]
    cut, constants = cut_of(where_x, mean, read[1], TILE)
    dy, x, residual = [*(aligned(t, where, cut) for t, where in zip(read, layouts[0], strict=True)), nothing][:3]
    dx, rest = [*(strides_of(t, where) for t, where in zip(parts, layouts[1], strict=True)), nothing][:2]
    images, spatial, groups, options = len(mean), where_x[2], mean.shape[1], options_of(cut)
    slots = cut.splits * cut.parts
    sums = torch.empty(images, slots, 2, groups, dtype=torch.float32, device=mean.device)
    pull, drift = torch.empty_like(mean), torch.empty_like(mean)
    grid, split = (images * cut.splits * cut.blocks,), (spatial, cut.splits, cut.per_split)
    rows = [0 if p is None else p.stride(0) for p in (scale, shift)]
    vectors = (mean, rstd, weight, bias, scale, shift, x_bias)
    (p_dy, p_x), *places = zip(dy, x, strict=True)
    numbers = (*places[0], *places[1], *rows)
    sums_kernel[grid](
        p_dy, p_x, sums, *vectors, *split, *numbers, SILU=silu, **constants, **_of_sums(options, constants)
    )
    finish = {"GROUPS": groups, "SIZE": constants["SIZE"], "SLOTS": triton.next_power_of_2(slots)}
    finish_sums_kernel[(images * groups,)](sums, rstd, pull, drift, spatial, slots, **finish, **MERGE_OPTIONS)
    tensors, *places = zip(dy, x, dx, rest, residual, strict=True)
    numbers = (*places[0], *places[1], *rows)
    constants["FIRST"] = layouts[1][0][1]
    gradient_kernel[grid](*tensors, pull, drift, *vectors, *split, *numbers, SILU=silu, **constants, **options)


def compilations() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(kernel, signature, constants, options) of what ADM-256 runs, and of ragged shapes."""
    kernels = (sums_kernel, finish_sums_kernel, gradient_kernel)
    for kernel, signature, constants, options in compilations_of(TILE, kernels):
        yield kernel, signature, constants, _of_sums(options, constants) if kernel is sums_kernel else options


def _of_sums(options: dict[str, Any], constants: dict[str, Any]) -> dict[str, Any]:
    """For channels_last, the registers that let six programs of float32 or five of a half type share a multiprocessor.
    Left to itself, the assembler takes up to 124 for sm_80, and that of Triton 3.6 once 72, where it spills."""
    if not constants["CHANNELS_LAST"] or constants["VECTOR"] == 1:
        return options
    return {**options, "maxnreg": 80 if constants["VECTOR"] == 4 else 96}
