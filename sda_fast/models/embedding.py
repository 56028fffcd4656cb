"""Sinusoidal timestep features, shared by ADM and DiT."""

import math

import torch
from torch import Tensor


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Cosines, then sines, of `timesteps` at `dim // 2` geometric frequencies.

    timesteps: [N], any dtype, in units of the original 1000 steps. Returns float32 [N, dim]; an odd `dim` is
    padded with a zero column. Vaswani et al. 2017, section 3.5, in the order of guided-diffusion and DiT.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    frequencies = torch.exp(-math.log(max_period) * exponents)
    angles = timesteps.float()[:, None] * frequencies
    features = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return torch.nn.functional.pad(features, (0, 1)) if dim % 2 else features
