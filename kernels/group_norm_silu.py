"""GroupNorm, scale and shift per image and SiLU in Triton; the derivative is in `group_norm_silu_backward`.

    u = (x - mean) A + B,   A = rstd weight (1 + scale),   B = bias (1 + scale) + shift,   y = u sigmoid(u)

Shapes: x, y [N, C, S], contiguous or channels_last, mean, rstd float32 [N, groups]. Bytes moved: x twice and y once.
Where there is an x_bias, x stands for x + x_bias, computed in float32 and never stored.
Source: Wu and He, "Group normalization", 2018, equations 1 to 3; scale and shift as in Dhariwal and Nichol, 2021,
section 3.1.

Tiles are those of `_norm_tiles`.
"""

from collections.abc import Iterator
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

TILE = 4096  # elements


@jit
def moments_kernel(
    p_x,
    p_x_bias,
    p_parts,
    spatial,
    splits,
    per_split,
    stride_x,
    pitch_x,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Mean and sum of squared deviations of a split of a group: p_parts float32 [N, slots, 2, GROUPS].

    The sums are taken relative to the mean of the split's first tile. It lies within sqrt(number of tiles) standard
    deviations of the split's mean, so neither a large mean nor an outlier costs precision.
    """
    i_block, i_split, i_image = place_of(tl.program_id(0), splits, GROUPS, SIZE, PARTS, BLOCK_C)
    IN_BLOCK: tl.constexpr = 1 if PARTS > 1 else BLOCK_C // triton.next_power_of_2(SIZE)
    channel, _, m_channel = channels_of(i_block, GROUPS, SIZE, PARTS, BLOCK_C)
    m_channels = across(m_channel, CHANNELS_LAST)
    p_image = image_of(p_x, i_image, stride_x, VECTOR)
    first, rows = split_of(i_split, per_split, spatial, CHANNELS_LAST, VECTOR)
    members = SIZE
    if PARTS > 1:
        members = tl.minimum(BLOCK_C, SIZE - i_block % PARTS * BLOCK_C)

    raised = None
    if p_x_bias is not None:
        raised = across(raise_of(p_x_bias, channel, m_channel), CHANNELS_LAST)

    within = tl.arange(0, BLOCK_S)
    position = first + within
    m_tile = m_channels & across(within < rows, not CHANNELS_LAST)
    o_tile = offsets_of(channel, position, pitch_x, CHANNELS_LAST, VECTOR)
    b_x = tl.where(m_tile, load_x(p_image + o_tile, m_tile, raised), 0.0)
    pivot = sum_groups(b_x, CHANNELS_LAST, IN_BLOCK, BLOCK_C) / (members * tl.minimum(rows, BLOCK_S)).to(tl.float32)
    by_channel = tl.broadcast_to(pivot[:, None], (IN_BLOCK, BLOCK_C // IN_BLOCK))
    pivots = across(tl.reshape(by_channel, (BLOCK_C,)), CHANNELS_LAST)
    d = tl.where(m_tile, b_x - pivots, 0.0)
    sums, squares = d, d * d
    for start in range(BLOCK_S, rows, BLOCK_S):
        position = first + start + within
        m_tile = m_channels & across(start + within < rows, not CHANNELS_LAST)
        o_tile = offsets_of(channel, position, pitch_x, CHANNELS_LAST, VECTOR)
        d = tl.where(m_tile, load_x(p_image + o_tile, m_tile, raised) - pivots, 0.0)
        sums += d
        squares += d * d

    count = (members * rows).to(tl.float32)
    total = sum_groups(sums, CHANNELS_LAST, IN_BLOCK, BLOCK_C)
    spread = sum_groups(squares, CHANNELS_LAST, IN_BLOCK, BLOCK_C) - total * (total / count)
    o_group = i_block // PARTS * IN_BLOCK + tl.arange(0, IN_BLOCK)
    p_slot = p_parts + ((i_image * splits + i_split) * PARTS + i_block % PARTS) * (2 * GROUPS) + o_group
    tl.store(p_slot, pivot + total / count, mask=o_group < GROUPS)
    tl.store(p_slot + GROUPS, tl.maximum(spread, 0.0), mask=o_group < GROUPS)


@jit
def finish_moments_kernel(
    p_parts,
    p_mean,
    p_rstd,
    spatial,
    per_split,
    slots,
    eps,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Merges the slots of one group of one image."""
    i = tl.program_id(0).to(tl.int64)
    i_slot = tl.arange(0, SLOTS)
    m_slot = i_slot < slots
    p_slot = p_parts + (i // GROUPS * slots + i_slot) * (2 * GROUPS) + i % GROUPS
    rows = tl.minimum(per_split, spatial - i_slot // PARTS * per_split)
    members = SIZE
    if PARTS > 1:
        members = tl.minimum(BLOCK_C, SIZE - i_slot % PARTS * BLOCK_C)
    count = tl.where(m_slot, (members * rows).to(tl.float32), 0.0)
    part = tl.load(p_slot, mask=m_slot, other=0.0)
    squares = tl.load(p_slot + GROUPS, mask=m_slot, other=0.0)
    total = tl.sum(count)
    pivot = tl.load(p_parts + i // GROUPS * slots * (2 * GROUPS) + i % GROUPS)
    d = tl.where(m_slot, part - pivot, 0.0)
    shift = tl.sum(d * count) / total
    spread = tl.sum(squares + (d - shift) * (d - shift) * count)
    tl.store(p_mean + i, pivot + shift)
    tl.store(p_rstd + i, tl.div_rn(1.0, tl.sqrt_rn(spread / total + eps)))


@jit
def apply_kernel(
    p_x,
    p_y,
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
    stride_x,
    stride_y,
    pitch_x,
    pitch_y,
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
    """y of one split of a block of channels."""
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
    raised = None
    if p_x_bias is not None:
        raised = across(raise_of(p_x_bias, channel, m_channel), CHANNELS_LAST)
    p_from = image_of(p_x, i_image, stride_x, VECTOR)
    p_to = image_of(p_y, i_image, stride_y, VECTOR)
    first, rows = split_of(i_split, per_split, spatial, CHANNELS_LAST, VECTOR)
    within = tl.arange(0, BLOCK_S)
    for start in range(0, rows, BLOCK_S):
        position = first + start + within
        m_tile = across(m_channel, CHANNELS_LAST) & across(start + within < rows, not CHANNELS_LAST)
        o_x = offsets_of(channel, position, pitch_x, CHANNELS_LAST, VECTOR)
        o_y = offsets_of(channel, position, pitch_y, CHANNELS_LAST, VECTOR)
        b_x = load_x(p_from + o_x, m_tile, raised)
        u = (b_x - across(mean, CHANNELS_LAST)) * across(slope, CHANNELS_LAST) + across(offset, CHANNELS_LAST)
        if SILU:
            u = u / (1.0 + tl.exp(-u))
        tl.store(p_to + o_y, u.to(p_y.dtype.element_ty), mask=m_tile)


def group_norm_silu(
    x: torch.Tensor,
    y: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    *,
    eps: float,
    silu: bool,
    layouts: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    """Writes y, and mean and rstd, float32 [N, groups].

    `layouts` are (images, channels, spatial, stride_image, stride_channel, stride_spatial) of x and y, in elements. The
    caller, `sda_fast.ops.group_norm_silu`, has checked everything.
    """
    cut, constants = cut_of(layouts[0], mean, x, TILE)
    (x, stride_x, pitch_x), (y, stride_y, pitch_y) = aligned(x, layouts[0], cut), strides_of(y, layouts[1])
    images, spatial, groups, options = len(mean), layouts[0][2], mean.shape[1], options_of(cut)
    slots = cut.splits * cut.parts
    parts = torch.empty(images, slots, 2, groups, dtype=torch.float32, device=x.device)
    grid, split = (images * cut.splits * cut.blocks,), (spatial, cut.splits, cut.per_split)
    moments_kernel[grid](x, x_bias, parts, *split, stride_x, pitch_x, **constants, **options)
    finish = {name: constants[name] for name in ("GROUPS", "SIZE", "PARTS", "BLOCK_C")}
    finish_moments_kernel[(images * groups,)](
        parts,
        mean,
        rstd,
        spatial,
        cut.per_split,
        slots,
        eps,
        SLOTS=triton.next_power_of_2(slots),
        **finish,
        **MERGE_OPTIONS,
    )
    rows = [0 if p is None else p.stride(0) for p in (scale, shift)]
    vectors = (mean, rstd, weight, bias, scale, shift, x_bias)
    apply_kernel[grid](
        x, y, *vectors, *split, stride_x, stride_y, pitch_x, pitch_y, *rows, SILU=silu, **constants, **options
    )


def compilations() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(kernel, signature, constants, options) of what ADM-256 runs, and of ragged shapes."""
    yield from compilations_of(TILE, (moments_kernel, finish_moments_kernel, apply_kernel))
