"""How the kernels of group_norm_silu and of its derivative see an image.

All kernels see a tile of BLOCK_C channels by BLOCK_S positions, its last axis the one that lies side by side in memory.
The channels of a tile are those of whole groups, each padded from SIZE to a power of two; where one group has more than
fit, its channels are spread over PARTS tiles. A program sums `per_split` positions and writes one partial result (a
slot); a second kernel merges the slots of a group in a fixed order. How an image is cut depends on its shape alone
(`_norm_plan`).
"""

import triton
import triton.language as tl

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
def place_of(i, splits, GROUPS: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """What the i-th program works on: block of channels, split of positions, image (int64)."""
    if PARTS > 1:
        BLOCKS: tl.constexpr = GROUPS * PARTS
    else:
        BLOCKS: tl.constexpr = triton.cdiv(GROUPS, BLOCK_C // triton.next_power_of_2(SIZE))
    return i % BLOCKS, i // BLOCKS % splits, (i // (BLOCKS * splits)).to(tl.int64)


@triton.jit
def last_first():
    """The programs' numbers from the last to the first: the kernel that reads an image for the second time begins with
    what the first one read last, as far as the L2 cache still holds it."""
    return tl.num_programs(0) - 1 - tl.program_id(0)


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
