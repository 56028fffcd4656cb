"""How an image is cut for the kernels of group_norm_silu and of its derivative, and what they are compiled for."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton

from sda_fast.kernels._norm_tiles import NUMBERS, POINTERS

MAX_CHANNELS = 256  # of a channels_last tile: 512 bytes of bfloat16 side by side
MAX_POSITIONS = 512  # of a contiguous tile
PROGRAMS = 256  # about so many share an image
MERGE_OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}  # of the kernels that merge slots


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
