"""One reverse step of the diffusion, plainly: the oracle of the operator `reverse_step`.

Source: Ho et al. 2020, algorithm 2; Nichol and Dhariwal 2021, equation 15; Gao et al. 2023, algorithm 1 (guidance).
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .philox import MASK, philox_normal


def guidance_weights(squares: Tensor, norm: str, norm_group: int, real: int) -> Tensor:
    """1 / norm of each image, from squared norms [N]; zero where it is zero. Images from `real` on are padding."""
    squares = torch.where(torch.arange(len(squares), device=squares.device) < real, squares, 0)
    if norm == "image":
        norms = (norm_group * squares).sqrt()
    else:
        groups = pad(squares, (0, -len(squares) % norm_group)).reshape(-1, norm_group).sum(1)
        norms = groups.sqrt().repeat_interleave(norm_group)[: len(squares)]
    return torch.where(norms > 0, 1 / norms, 0)


def reverse_step(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    position: Tensor,
    *,
    noise: Tensor | None = None,
    seed: int | None = None,
    identities: Tensor | None = None,
    clip: bool = True,
    cotangent: Tensor | None = None,
    through_network: Tensor | None = None,
    squares: Tensor | None = None,
    scale: float = 0.0,
    norm: str = "image",
    norm_group: int = 1,
    real: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """x_{t-1}, computed in `dtype`; the arguments are those of `sda_fast.ops.reverse_step`."""
    a, b, c1, c2, low, high, noise_scale, _ = table.to(dtype).index_select(0, position[:1])[0].unbind()
    x, (eps, *learned) = x.to(dtype), out.to(dtype).split(x.shape[1], dim=1)
    raw = a * x - b * eps
    x0 = raw.clamp(-1, 1) if clip else raw
    mean = c1 * x0 + c2 * x
    if noise is None:
        assert seed is not None
        assert identities is not None
        noise = philox_normal(x.shape, seed=seed, identities=identities, step=position[1] & MASK)
    logvar = high
    if learned:
        fraction = (learned[0] + 1) / 2
        logvar = fraction * high + (1 - fraction) * low
    sigma = noise_scale * (0.5 * logvar).exp()
    sample = torch.where(noise_scale != 0, mean + sigma * noise.to(dtype), mean)
    if cotangent is None or through_network is None or squares is None:
        return sample
    g = a * cotangent.to(dtype) - b * through_network.to(dtype)
    weights = guidance_weights(squares.to(dtype), norm, norm_group, len(x) if real is None else real)
    return sample + scale * weights[:, None, None, None] * g
