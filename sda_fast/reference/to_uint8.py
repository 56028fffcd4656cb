"""Images in [-1, 1] as bytes, plainly: the oracle of the operator `to_uint8`."""

import torch
from torch import Tensor


def to_uint8(x: Tensor, mode: str = "round") -> Tensor:
    """[N, C, H, W] in [-1, 1] -> uint8 [N, H, W, C]; values outside are clamped, NaN becomes 0.

    "round": as torchvision's `save_image` stores (x + 1) / 2; "truncate": as DiT's sampler stores x. Every product and
    sum is rounded by itself in float32.
    """
    x = x.float()
    level = ((x + 1) / 2).mul(255).add(0.5) if mode == "round" else 127.5 * x + 128.0
    return level.clamp(0, 255).nan_to_num(0).permute(0, 2, 3, 1).to(torch.uint8).contiguous()
