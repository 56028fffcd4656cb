"""Low-pass guidance in Triton: the formula, and how rows are counted in groups, stand in csrc/guidance.h.

    raw = a x - b eps,  x0 = clamp(raw, -1, 1),  low = reference_down - P x0 P^T,  smooth = G low G
    squares = <low, smooth>,  cotangent = P^T smooth P where -1 <= raw <= 1, else 0

Shapes: x, x0, cotangent [N, C, n, n]; out [N, C or 2C, n, n]; reference_down [N, C, m, m]; P [m, n]; G [m, m]. Source:
Gao et al., "Back to the Source", CVPR 2023, algorithm 1.

Four launches: `reduce_kernel` reads x and eps once and writes P x0, by tiles of groups of rows, and the clamp mask,
four rows to a byte; `low_kernel` and `smooth_kernel` work on the small images; `spread_kernel` writes the cotangent.
Bytes moved per element of x: 4 for x, the size of out's dtype for eps and for the cotangent, 4 for x0 if asked, and on
the side 1/2 for the mask and about 8/D for P x0 (D = n / m), both of which fit in the second cache. The columns of a
row are those of one channel or, in channels_last, of all channels interleaved: LANES is 1 or C.

The mask has the bits of the other versions because products and sums are never fused (`enable_fp_fusion=False`).
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 256  # columns of a program at most
TILE_ROWS = 44  # of an image, about; 11 groups for D = 4, of which 65 make 256 rows


@triton.jit
def clamp_unit(raw):
    """NaN stays NaN."""
    above = tl.where(raw < -1.0, -1.0, raw)
    return tl.where(above > 1.0, 1.0, above)


@triton.jit
def columns_if(i_column, width, m_row):
    """i_column < width, if the scalar m_row holds. (The interpreter mistypes `tensor & scalar` of masks.)"""
    return i_column < tl.where(m_row, width, 0)


@triton.jit
def down_weight(p_down, row, h, low, size, m_h):
    """P[row, h], zero where there is none."""
    return tl.load(p_down + row * size + h, mask=m_h & (row >= 0) & (row < low), other=0.0)


@triton.jit
def reduce_kernel(
    p_x,
    p_out,
    p_table,
    p_position,
    p_down,
    p_sums,
    p_mask,
    p_x0,
    x_image,
    x_channel,
    x_row,
    x_column,
    out_image,
    out_channel,
    out_row,
    out_column,
    x0_image,
    x0_channel,
    x0_row,
    x0_column,
    steps,
    planes,
    size,
    low,
    tiles,
    groups,
    chunks,
    FACTOR: tl.constexpr,
    LANES: tl.constexpr,
    WRITE_X0: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of P x0 over the groups of one tile, [groups + 3, columns], and their mask, four rows a byte."""
    LEAD: tl.constexpr = 3 * FACTOR // 2
    QUADS: tl.constexpr = (FACTOR + 3) // 4
    i_program = tl.program_id(0).to(tl.int64)
    i_tile = (i_program // chunks % tiles).to(tl.int32)
    i_plane = i_program // chunks // tiles
    i_image = i_plane // planes
    i_column = (i_program % chunks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    width = size * LANES
    m_column = i_column < width
    i_w = (i_column // LANES).to(tl.int64)
    i_c = i_plane % planes + (i_column % LANES).to(tl.int64)
    p_x += i_image * x_image
    p_out += i_image * out_image
    o_x = i_c * x_channel + i_w * x_column
    o_out = i_c * out_channel + i_w * out_column
    o_x0 = i_image * x0_image + i_c * x0_channel + i_w * x0_column
    row = tl.load(p_position)
    inside = (row >= 0) & (row < steps)
    a = tl.load(p_table + row * 8, mask=inside, other=float("nan"))
    b = tl.load(p_table + row * 8 + 1, mask=inside, other=float("nan"))
    first = 1 + i_tile * groups
    last = tl.minimum(first + groups, low + 2)
    p_sums += (i_plane * tiles + i_tile) * (groups + 3) * width
    p_mask += i_plane * (low + 2) * QUADS * width
    b_one = tl.zeros((BLOCK,), tl.float32)  # what the last three groups gave to the next three rows of P x0
    b_two = tl.zeros((BLOCK,), tl.float32)
    b_three = tl.zeros((BLOCK,), tl.float32)
    for i_group in range(last - first + 3):
        q = first + i_group
        stop = tl.where(q < last, tl.minimum(size, (q + 1) * FACTOR - LEAD), 0)
        b_s0 = tl.zeros((BLOCK,), tl.float32)
        b_s1 = tl.zeros((BLOCK,), tl.float32)
        b_s2 = tl.zeros((BLOCK,), tl.float32)
        b_s3 = tl.zeros((BLOCK,), tl.float32)
        for i_quad in range(QUADS):
            b_bits = tl.zeros((BLOCK,), tl.int32)
            for u in tl.static_range(4 if FACTOR > 4 else FACTOR):
                h = q * FACTOR + i_quad * 4 + u - LEAD
                m_h = (h >= 0) & (h < stop)
                m_load = columns_if(i_column, width, m_h)
                b_x = tl.load(p_x + h.to(tl.int64) * x_row + o_x, mask=m_load, other=0.0)
                b_eps = tl.load(p_out + h.to(tl.int64) * out_row + o_out, mask=m_load, other=0.0).to(tl.float32)
                b_raw = a * b_x - b * b_eps
                b_x0 = clamp_unit(b_raw)
                b_bits |= (b_x0 == b_raw).to(tl.int32) << u
                if WRITE_X0:
                    tl.store(p_x0 + h.to(tl.int64) * x0_row + o_x0, b_x0, mask=m_load)
                b_s0 += down_weight(p_down, q, h, low, size, m_h) * b_x0
                b_s1 += down_weight(p_down, q - 1, h, low, size, m_h) * b_x0
                b_s2 += down_weight(p_down, q - 2, h, low, size, m_h) * b_x0
                b_s3 += down_weight(p_down, q - 3, h, low, size, m_h) * b_x0
            o_mask = (q * QUADS + i_quad).to(tl.int64) * width + i_column
            tl.store(p_mask + o_mask, b_bits.to(tl.uint8), mask=columns_if(i_column, width, q < last))
        tl.store(p_sums + (q - first).to(tl.int64) * width + i_column, b_three + b_s3, mask=m_column)
        b_three = b_two + b_s2
        b_two = b_one + b_s1
        b_one = b_s0


@triton.jit
def low_kernel(
    p_reference,
    p_down,
    p_sums,
    p_low,
    planes,
    channels,
    size,
    low,
    tiles,
    groups,
    chunks,
    FACTOR: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row of low, [m LANES]: the tiles' sums of this row of P x0 together, then times P^T."""
    LEAD: tl.constexpr = 3 * FACTOR // 2
    i_program = tl.program_id(0).to(tl.int64)
    i_row = (i_program // chunks % low).to(tl.int32)
    i_plane = i_program // chunks // low
    i_column = (i_program % chunks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    m_column = i_column < low * LANES
    i_w = i_column // LANES
    i_lane = i_column % LANES
    width = size * LANES
    first_tile = (tl.maximum(i_row, 1) - 1) // groups
    last_tile = (tl.minimum(i_row + 3, low + 1) - 1) // groups
    # There are at least three groups in a tile, so a row of P meets two tiles at most.
    p_first = p_sums + ((i_plane * tiles + first_tile) * (groups + 3) + i_row + 2 - first_tile * groups) * width
    p_last = p_sums + ((i_plane * tiles + last_tile) * (groups + 3) + i_row + 2 - last_tile * groups) * width
    m_last = columns_if(i_column, low * LANES, last_tile > first_tile)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for tap in range(4 * FACTOR):
        i_from = i_w * FACTOR + tap - LEAD
        m_from = m_column & (i_from >= 0) & (i_from < size)
        o_from = i_from * LANES + i_lane
        b_value = tl.load(p_first + o_from, mask=m_from, other=0.0)
        b_value += tl.load(p_last + o_from, mask=m_from & m_last, other=0.0)
        b_sum += tl.load(p_down + i_w * size + i_from, mask=m_from, other=0.0) * b_value
    i_channel = i_plane // planes * channels + i_plane % planes + i_lane
    b_reference = tl.load(p_reference + (i_channel * low + i_row) * low + i_w, mask=m_column, other=0.0)
    tl.store(p_low + (i_plane * low + i_row) * low * LANES + i_column, b_reference - b_sum, mask=m_column)


@triton.jit
def smooth_kernel(p_gram, p_low, p_smooth, p_parts, low, chunks, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """A row of smooth = G low G, and its share of <low, smooth>."""
    i_program = tl.program_id(0).to(tl.int64)
    i_row = (i_program // chunks % low).to(tl.int32)
    i_plane = i_program // chunks // low
    i_column = (i_program % chunks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    width = low * LANES
    m_column = i_column < width
    i_w = i_column // LANES
    i_lane = i_column % LANES
    p_low += i_plane * low * width
    b_smooth = tl.zeros((BLOCK,), tl.float32)
    for i in range(7):
        i_from = i_row + i - 3
        m_row = (i_from >= 0) & (i_from < low)
        m_columns = columns_if(i_column, width, m_row)
        b_across = tl.zeros((BLOCK,), tl.float32)
        for j in tl.static_range(7):
            i_s = i_w + j - 3
            m_s = m_columns & (i_s >= 0) & (i_s < low)
            b_low = tl.load(p_low + i_from * width + i_s * LANES + i_lane, mask=m_s, other=0.0)
            b_across += tl.load(p_gram + i_w * low + i_s, mask=m_s, other=0.0) * b_low
        b_smooth += tl.load(p_gram + i_row * low + i_from, mask=m_row, other=0.0) * b_across
    tl.store(p_smooth + (i_plane * low + i_row) * width + i_column, b_smooth, mask=m_column)
    b_low = tl.load(p_low + i_row * width + i_column, mask=m_column, other=0.0)
    tl.store(p_parts + i_program, tl.sum(b_low * b_smooth, axis=0))


@triton.jit
def expanded(p_smooth, row, i_column, width, i_p, i_lane, b_w0, b_w1, b_w2, b_w3, low, LANES: tl.constexpr):
    """A row of smooth P; i_p is the last of the four columns of smooth that a column meets."""
    m_row = columns_if(i_column, width, (row >= 0) & (row < low))
    p_row = p_smooth + row * low * LANES + i_lane
    b_3 = tl.load(p_row + (i_p - 3) * LANES, mask=m_row & (i_p >= 3) & (i_p - 3 < low), other=0.0)
    b_2 = tl.load(p_row + (i_p - 2) * LANES, mask=m_row & (i_p >= 2) & (i_p - 2 < low), other=0.0)
    b_1 = tl.load(p_row + (i_p - 1) * LANES, mask=m_row & (i_p >= 1) & (i_p - 1 < low), other=0.0)
    b_0 = tl.load(p_row + i_p * LANES, mask=m_row & (i_p < low), other=0.0)
    return b_w3 * b_3 + b_w2 * b_2 + b_w1 * b_1 + b_w0 * b_0


@triton.jit
def spread_kernel(
    p_down,
    p_smooth,
    p_mask,
    p_parts,
    p_cotangent,
    p_squares,
    planes,
    channels,
    size,
    low,
    tiles,
    groups,
    chunks,
    parts,
    FACTOR: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """cotangent = P^T (smooth P), masked, on the groups of one tile; the first program of an image sums its squares."""
    LEAD: tl.constexpr = 3 * FACTOR // 2
    QUADS: tl.constexpr = (FACTOR + 3) // 4
    i_program = tl.program_id(0).to(tl.int64)
    i_tile = (i_program // chunks % tiles).to(tl.int32)
    i_plane = i_program // chunks // tiles
    i_image = i_plane // planes
    if i_program % (chunks * tiles * planes) == 0:
        b_total = tl.zeros((BLOCK,), tl.float32)
        for o_part in range(0, parts, BLOCK):
            i_part = o_part + tl.arange(0, BLOCK)
            b_total += tl.load(p_parts + i_image * parts + i_part, mask=i_part < parts, other=0.0)
        tl.store(p_squares + i_image, tl.sum(b_total, axis=0))
    i_column = (i_program % chunks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    width = size * LANES
    m_column = i_column < width
    i_w = i_column // LANES
    i_lane = i_column % LANES
    i_p = (i_w + LEAD) // FACTOR
    b_w0 = down_weight(p_down, i_p, i_w, low, size, m_column)
    b_w1 = down_weight(p_down, i_p - 1, i_w, low, size, m_column)
    b_w2 = down_weight(p_down, i_p - 2, i_w, low, size, m_column)
    b_w3 = down_weight(p_down, i_p - 3, i_w, low, size, m_column)
    first = 1 + i_tile * groups
    last = tl.minimum(first + groups, low + 2)
    p_smooth += i_plane * low * low * LANES
    p_mask += i_plane * (low + 2) * QUADS * width
    p_cotangent += (i_image * channels + i_plane % planes) * size * size
    b_t3 = expanded(p_smooth, first - 3, i_column, width, i_p, i_lane, b_w0, b_w1, b_w2, b_w3, low, LANES)
    b_t2 = expanded(p_smooth, first - 2, i_column, width, i_p, i_lane, b_w0, b_w1, b_w2, b_w3, low, LANES)
    b_t1 = expanded(p_smooth, first - 1, i_column, width, i_p, i_lane, b_w0, b_w1, b_w2, b_w3, low, LANES)
    for i_group in range(last - first):
        q = first + i_group
        stop = tl.minimum(size, (q + 1) * FACTOR - LEAD)
        b_t0 = expanded(p_smooth, q, i_column, width, i_p, i_lane, b_w0, b_w1, b_w2, b_w3, low, LANES)
        for i_quad in range(QUADS):
            o_mask = (q * QUADS + i_quad).to(tl.int64) * width + i_column
            b_bits = tl.load(p_mask + o_mask, mask=m_column, other=0).to(tl.int32)
            for u in tl.static_range(4 if FACTOR > 4 else FACTOR):
                h = q * FACTOR + i_quad * 4 + u - LEAD
                m_h = (h >= 0) & (h < stop)
                b_sum = down_weight(p_down, q - 3, h, low, size, m_h) * b_t3
                b_sum += down_weight(p_down, q - 2, h, low, size, m_h) * b_t2
                b_sum += down_weight(p_down, q - 1, h, low, size, m_h) * b_t1
                b_sum += down_weight(p_down, q, h, low, size, m_h) * b_t0
                b_sum = tl.where((b_bits >> u) & 1 != 0, b_sum, 0.0)
                p_row = p_cotangent + h.to(tl.int64) * width
                tl.store(
                    p_row + i_column, b_sum.to(p_cotangent.dtype.element_ty), mask=columns_if(i_column, width, m_h)
                )
        b_t3 = b_t2
        b_t2 = b_t1
        b_t1 = b_t0


def tiling(low: int, factor: int) -> tuple[int, int]:
    """(tiles, groups in a tile) for m = low: tiles of about TILE_ROWS rows and at least three of the m + 1 groups."""
    groups = max(3, triton.cdiv(low + 1, max(1, (low + 1) * factor // TILE_ROWS)))
    return triton.cdiv(low + 1, groups), groups


def guidance(
    cotangent: torch.Tensor,
    squares: torch.Tensor,
    x0: torch.Tensor | None,
    x: torch.Tensor,
    out: torch.Tensor,
    reference_down: torch.Tensor,
    down: torch.Tensor,
    gram: torch.Tensor,
    table: torch.Tensor,
    position: torch.Tensor,
) -> None:
    """Fills cotangent [N, C, n, n], contiguous or channels_last, squares [N] and, if it is given, x0 [N, C, n, n].

    The caller, `sda_fast.ops.guidance`, has checked everything; reference_down, down, gram and table are contiguous.
    """
    images, channels, size, _ = x.shape
    low = down.shape[0]
    factor = size // low
    lanes = 1 if cotangent.is_contiguous() else channels
    planes = channels // lanes
    count = images * planes
    tiles, groups = tiling(low, factor)
    block, small = (min(BLOCK, triton.next_power_of_2(side * lanes)) for side in (size, low))
    chunks, small_chunks = triton.cdiv(size * lanes, block), triton.cdiv(low * lanes, small)
    sums = x.new_empty(count, tiles, groups + 3, size * lanes)
    mask = x.new_empty(count, low + 2, (factor + 3) // 4, size * lanes, dtype=torch.uint8)
    lows, smooth = x.new_empty(2, count, low, low * lanes)
    parts = x.new_empty(images, planes * low * small_chunks)
    target = x if x0 is None else x0
    big = dict(num_warps=max(1, block // 128), enable_fp_fusion=False)
    little = dict(num_warps=max(1, small // 64), enable_fp_fusion=False)
    sizes = (planes, size, low, tiles, groups, chunks)
    wide = dict(FACTOR=factor, LANES=lanes, BLOCK=block)
    strides = (*x.stride(), *out.stride(), *target.stride())
    reduce_kernel[(count * tiles * chunks,)](
        x,
        out,
        table,
        position,
        down,
        sums,
        mask,
        target,
        *strides,
        len(table),
        *sizes,
        WRITE_X0=x0 is not None,
        **wide,
        **big,
    )
    low_kernel[(count * low * small_chunks,)](
        reference_down,
        down,
        sums,
        lows,
        planes,
        channels,
        size,
        low,
        tiles,
        groups,
        small_chunks,
        FACTOR=factor,
        LANES=lanes,
        BLOCK=small,
        **little,
    )
    smooth_kernel[(count * low * small_chunks,)](
        gram, lows, smooth, parts, low, small_chunks, LANES=lanes, BLOCK=small, **little
    )
    spread_kernel[(count * tiles * chunks,)](
        down,
        smooth,
        mask,
        parts,
        cotangent,
        squares,
        planes,
        channels,
        size,
        low,
        tiles,
        groups,
        chunks,
        parts.shape[1],
        **wide,
        **big,
    )


def compilations() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(kernel, signature, constexprs, options) of representative specialisations, for checks of registers."""
    for out, factor, lanes in (("*fp32", 4, 1), ("*bf16", 4, 3), ("*fp16", 16, 1), ("*fp32", 5, 3)):
        wide = dict(FACTOR=factor, LANES=lanes, BLOCK=BLOCK)
        pointers = dict(p_position="*i64", p_mask="*u8", p_out=out, p_cotangent=out)
        for kernel, constexprs in (
            (reduce_kernel, dict(wide, WRITE_X0=True)),
            (low_kernel, dict(wide, BLOCK=64)),
            (smooth_kernel, dict(LANES=lanes, BLOCK=64)),
            (spread_kernel, wide),
        ):
            if kernel in (low_kernel, smooth_kernel) and out != "*fp32":
                continue
            signature = {
                name: {**pointers, "p_out": out, "p_cotangent": out}.get(
                    name, "*fp32" if name.startswith("p_") else "i32"
                )
                for name in kernel.arg_names
            }
            num_warps = 1 if constexprs["BLOCK"] == 64 else 2
            yield kernel, signature, constexprs, dict(num_warps=num_warps, enable_fp_fusion=False)
