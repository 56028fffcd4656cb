"""GroupNorm, scale and shift per image and SiLU in Triton; the derivative is in `group_norm_silu_backward`.

    u = (x - mean) A + B,   A = rstd weight (1 + scale),   B = bias (1 + scale) + shift,   y = u sigmoid(u)

Shapes: x, y [N, C, S], contiguous or channels_last, mean, rstd float32 [N, groups]. Bytes moved: x twice and y once.
Where there is an x_bias, x stands for x + x_bias, computed in float32 and never stored.
Source: Wu and He, "Group normalization", 2018, equations 1 to 3; scale and shift as in Dhariwal and Nichol, 2021,
section 3.1.

All kernels see a tile of BLOCK_C channels by BLOCK_S positions, its last axis the one that lies side by side in memory.
The channels of a tile are those of whole groups, each padded from SIZE to a power of two; where one group has more than
fit, its channels are spread over PARTS tiles. A program sums `per_split` positions and writes one partial result (a
slot); a second kernel merges the slots of a group in a fixed order. How an image is cut depends on its shape alone.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

TILE = 4096  # elements
MAX_CHANNELS = 256  # of a channels_last tile: 512 bytes of bfloat16 side by side
MAX_POSITIONS = 512  # of a contiguous tile
PROGRAMS = 256  # about so many share an image
MERGE_OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}  # of the kernels that merge slots

# Two equal images must be summed by the same code wherever they lie: so nothing is specialised on the alignment of a
# pointer or a stride. Where the shape allows 16-byte accesses (VECTOR > 1), the launchers see to it that they are
# possible.
NUMBERS = ["spatial", "splits", "per_split", "slots", "eps", "pitch_dy", "pitch_x", "pitch_y", "pitch_dx"]
NUMBERS += ["stride_dy", "stride_x", "stride_y", "stride_dx", "stride_scale", "stride_shift"]
NUMBERS += ["pitch_residual", "stride_residual", "pitch_rest", "stride_rest"]
POINTERS = ["p_dy", "p_x", "p_y", "p_dx", "p_rest", "p_residual", "p_parts", "p_pull", "p_drift", "p_mean", "p_rstd"]
POINTERS += ["p_weight", "p_bias", "p_scale", "p_shift", "p_x_bias"]
jit = triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=POINTERS)


@triton.jit
def channels_of(i_block, GROUPS: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of a block of channels: the indices, the groups, and which ones exist; int32 [BLOCK_C]."""
    lane = tl.arange(0, BLOCK_C)
    padded: tl.constexpr = triton.next_power_of_2(SIZE)
    if PARTS > 1:
        i_group = i_block // PARTS + lane * 0
        within = i_block % PARTS * BLOCK_C + lane
        channel = i_group * SIZE + within
        m_channel = within < SIZE
    elif padded == SIZE:
        channel = i_block * BLOCK_C + lane
        i_group = channel // SIZE
        m_channel = channel < GROUPS * SIZE
    else:
        i_group = i_block * (BLOCK_C // padded) + lane // padded
        channel = i_group * SIZE + lane % padded
        m_channel = (lane % padded < SIZE) & (i_group < GROUPS)
    return channel, i_group, m_channel


@triton.jit
def place_of(splits, GROUPS: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """What this program works on: block of channels, split of positions, image (int64)."""
    if PARTS > 1:
        BLOCKS: tl.constexpr = GROUPS * PARTS
    else:
        BLOCKS: tl.constexpr = triton.cdiv(GROUPS, BLOCK_C // triton.next_power_of_2(SIZE))
    i = tl.program_id(0)
    return i % BLOCKS, i // BLOCKS % splits, (i // (BLOCKS * splits)).to(tl.int64)


@triton.jit
def across(v, CHANNELS_LAST: tl.constexpr):
    """A vector over channels as a tile of one position."""
    if CHANNELS_LAST:
        v = v[None, :]
    else:
        v = v[:, None]
    return v


@triton.jit
def offsets_of(channel, position, pitch, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr):
    """Where the elements of a tile lie within the image; VECTOR divides every row's start."""
    if CHANNELS_LAST:
        offsets = tl.multiple_of(position.to(tl.int64) * pitch, VECTOR)[:, None] + channel[None, :]
    else:
        offsets = tl.multiple_of(channel.to(tl.int64) * pitch, VECTOR)[:, None] + position[None, :]
    return offsets


@triton.jit
def split_of(i_split, per_split, spatial, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr):
    """The first position of a split and their number."""
    first = i_split * per_split
    rows = tl.minimum(per_split, spatial - first)
    if not CHANNELS_LAST:  # lets masked accesses stay wide
        first, rows = tl.multiple_of(first, VECTOR), tl.multiple_of(rows, VECTOR)
    return first, rows


@triton.jit
def image_of(p, i_image, stride_image, VECTOR: tl.constexpr):
    """The pointer to an image; VECTOR elements are what a thread may read at once."""
    p_image = p + i_image * stride_image
    return tl.multiple_of(p_image, VECTOR * (p.dtype.element_ty.primitive_bitwidth // 8))


@triton.jit
def raise_of(p_x_bias, channel, m_channel):
    """x_bias of every channel, float32; zero for padding."""
    return tl.load(p_x_bias + channel, mask=m_channel, other=0.0).to(tl.float32)


@triton.jit
def load_x(p, mask, raised):
    """A tile of x, raised by x_bias unless that is None, float32; meaningless where the mask is not set."""
    b_x = tl.load(p, mask=mask, other=0.0).to(tl.float32)
    if raised is not None:
        b_x = b_x + raised
    return b_x


@triton.jit
def sum_groups(tile, CHANNELS_LAST: tl.constexpr, IN_BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sums over the groups of a tile, float32 [IN_BLOCK]."""
    channels = tl.sum(tile, axis=0 if CHANNELS_LAST else 1)
    return tl.sum(tl.reshape(channels, (IN_BLOCK, BLOCK_C // IN_BLOCK)), axis=1)


@triton.jit
def affine_of(
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
    GROUPS: tl.constexpr,
):
    """mean, A and B of every channel, float32; zero for padding."""
    o_group = i_image * GROUPS + i_group
    mean = tl.load(p_mean + o_group, mask=m_channel, other=0.0)
    slope = tl.load(p_rstd + o_group, mask=m_channel, other=0.0)
    slope = slope * tl.load(p_weight + channel, mask=m_channel, other=0.0).to(tl.float32)
    offset = tl.load(p_bias + channel, mask=m_channel, other=0.0).to(tl.float32)
    if p_scale is not None:
        o_scale = i_image * stride_scale + channel
        scale = 1.0 + tl.load(p_scale + o_scale, mask=m_channel, other=0.0).to(tl.float32)
        slope = slope * scale
        offset = offset * scale
    if p_shift is not None:
        o_shift = i_image * stride_shift + channel
        offset = offset + tl.load(p_shift + o_shift, mask=m_channel, other=0.0).to(tl.float32)
    return mean, slope, offset


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
    i_block, i_split, i_image = place_of(splits, GROUPS, SIZE, PARTS, BLOCK_C)
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
    i_block, i_split, i_image = place_of(splits, GROUPS, SIZE, PARTS, BLOCK_C)
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


class Plan(NamedTuple):
    """How an image is cut."""

    parts: int
    block_c: int
    block_s: int
    blocks: int
    splits: int
    per_split: int
    vector: int


@cache
def plan(channels: int, groups: int, spatial: int, channels_last: bool, itemsize: int, tile: int) -> Plan:
    """`tile` is the number of elements of a tile, a power of two."""
    size = channels // groups
    padded = triton.next_power_of_2(size)
    every = padded * triton.next_power_of_2(groups)
    if channels_last:
        block_c = min(MAX_CHANNELS, every)
        block_s = min(triton.next_power_of_2(spatial), tile // block_c)
    else:
        block_s = min(triton.next_power_of_2(spatial), MAX_POSITIONS)
        block_c = min(tile // block_s, every)
    parts = triton.cdiv(size, block_c)
    blocks = groups * parts if parts > 1 else triton.cdiv(groups, block_c // padded)
    tiles = triton.cdiv(spatial, block_s)
    per_split = triton.cdiv(tiles * blocks, PROGRAMS)
    splits = triton.cdiv(tiles, per_split)
    wide = 16 // itemsize
    vector = wide if (channels if channels_last else spatial) % wide == 0 else 1
    return Plan(parts, block_c, block_s, blocks, splits, per_split * block_s, vector)


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


def cut_of(layout: tuple[int, ...], mean: torch.Tensor, x: torch.Tensor, tile: int) -> tuple[Plan, dict[str, Any]]:
    """The plan and what of it the kernels are compiled for."""
    _, channels, spatial, _, _, stride_spatial = layout
    groups, channels_last = mean.shape[1], stride_spatial != 1
    cut = plan(channels, groups, spatial, channels_last, x.element_size(), tile)
    return cut, constants_of(cut, groups, channels // groups, channels_last)


def constants_of(cut: Plan, groups: int, size: int, channels_last: bool) -> dict[str, Any]:
    return {
        "GROUPS": groups,
        "SIZE": size,
        "PARTS": cut.parts,
        "CHANNELS_LAST": channels_last,
        "VECTOR": cut.vector,
        "BLOCK_C": cut.block_c,
        "BLOCK_S": cut.block_s,
    }


def options_of(cut: Plan) -> dict[str, Any]:
    """Single elements need more registers than wide accesses do, so they are spread over more threads."""
    return {"num_warps": 4 if cut.vector > 1 else 8, "enable_fp_fusion": True}


def strides_of(x: torch.Tensor, layout: tuple[int, ...]) -> tuple[torch.Tensor, int, int]:
    """x, its stride from image to image, and that from row to row."""
    _, _, _, stride_image, stride_channel, stride_spatial = layout
    return x, stride_image, stride_channel if stride_spatial == 1 else stride_spatial


def aligned(x: torch.Tensor, layout: tuple[int, ...], cut: Plan) -> tuple[torch.Tensor, int, int]:
    """The same, copied where the plan's accesses are wider than its place allows."""
    x, stride_image, pitch = strides_of(x, layout)
    if cut.vector == 1 or (x.data_ptr() % 16, stride_image % cut.vector, pitch % cut.vector) == (0, 0, 0):
        return x, stride_image, pitch
    _, channels, spatial, _, _, stride_spatial = layout
    if stride_spatial == 1:
        return x.clone(memory_format=torch.contiguous_format), channels * spatial, spatial
    return x.movedim(1, -1).clone(memory_format=torch.contiguous_format), channels * spatial, channels


def compilations() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(kernel, signature, constants, options) of what ADM-256 runs, and of ragged shapes."""
    yield from compilations_of(TILE, (moments_kernel, finish_moments_kernel, apply_kernel))


def compilations_of(
    tile: int, kernels: Sequence[Any]
) -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    for element, itemsize, channels_last, channels, groups, spatial in (
        ("fp32", 4, True, 256, 32, 256**2),
        ("bf16", 2, True, 256, 32, 256**2),
        ("bf16", 2, False, 256, 32, 256**2),  # backward, a group lies in two tiles
        ("bf16", 2, True, 768, 32, 128**2),  # groups padded from 24 to 32 channels
        ("fp16", 2, False, 96, 32, 35),  # nothing divides anything
    ):
        cut = plan(channels, groups, spatial, channels_last, itemsize, tile)
        constants = constants_of(cut, groups, channels // groups, channels_last)
        constants |= {"SILU": True, "SLOTS": triton.next_power_of_2(cut.splits * cut.parts)}
        constants["FIRST"] = channels // 2
        types = dict.fromkeys(NUMBERS, "i32") | {"eps": "fp32"} | dict.fromkeys(POINTERS, "*fp32")
        types |= dict.fromkeys(
            ("p_dy", "p_x", "p_y", "p_dx", "p_rest", "p_residual", "p_scale", "p_shift", "p_x_bias"), f"*{element}"
        )
        for kernel in kernels:
            if "SLOTS" in kernel.arg_names and spatial != 256**2:
                continue  # the kernels that merge slots do not depend on the layout
            options = MERGE_OPTIONS if "SLOTS" in kernel.arg_names else options_of(cut)
            optional = [name for name in ("p_x_bias", "p_rest", "p_residual") if name in kernel.arg_names]
            for absent in ([], optional) if optional else ([],):
                every = constants | dict.fromkeys(absent)
                chosen = {name: value for name, value in every.items() if name in kernel.arg_names}
                signature = {name: types[name] for name in kernel.arg_names if name not in chosen}
                yield kernel, signature, chosen, options
