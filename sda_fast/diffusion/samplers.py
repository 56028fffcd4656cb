"""Reverse diffusion as plain functions, in the notation of Ho et al. 2020 and Dhariwal & Nichol 2021.

`i` is an index into a `Schedule` (0 the least noisy). A network output is [N, C, H, W] (noise) or [N, 2C, H, W]
(noise, then the interpolation v of the learned variance).
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sda_fast.diffusion.schedule import Schedule

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x [N, C, H, W], timesteps int64 [N]) -> network output
NoiseSource = Callable[[int], Tensor]  # number of the reverse step, 1, 2, ... -> standard normal [N, C, H, W]


def q_sample(schedule: Schedule, i: int, x0: Tensor, noise: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (Ho et al. 2020, equation 4); all [N, C, H, W]."""
    abar = schedule.alphas_cumprod[i].item()
    return math.sqrt(abar) * x0 + math.sqrt(1 - abar) * noise


def pred_xstart(schedule: Schedule, i: int, x: Tensor, eps: Tensor) -> Tensor:
    """x_0 = sqrt(1/abar_t) x_t - sqrt(1/abar_t - 1) eps, not clamped; all [N, C, H, W]."""
    a, b = schedule.sqrt_recip_alphas_cumprod[i].item(), schedule.sqrt_recipm1_alphas_cumprod[i].item()
    return a * x - b * eps


def posterior_sample(schedule: Schedule, i: int, x0: Tensor, x: Tensor, v: Tensor | None, noise: Tensor) -> Tensor:
    """A draw of x_{t-1} given x_0 and x_t: posterior mean plus exp(log variance / 2) noise; the mean itself at i = 0.

    All [N, C, H, W]. The log variance is (v+1)/2 log beta_t + (1-v)/2 log betatilde_t (Nichol & Dhariwal 2021,
    equation 15); without v it is that of beta_t, guided-diffusion's default.
    """
    c1, c2 = schedule.posterior_mean_coef1[i].item(), schedule.posterior_mean_coef2[i].item()
    mean = c1 * x0 + c2 * x
    if i == 0:
        return mean
    low = schedule.posterior_log_variance_clipped[i].item()
    high = math.log(schedule.betas[i].item())
    if v is None:
        return mean + math.exp(0.5 * high) * noise
    fraction = (v + 1) / 2
    return mean + (0.5 * (fraction * high + (1 - fraction) * low)).exp() * noise


def timesteps_at(schedule: Schedule, i: int, x: Tensor) -> Tensor:
    """What the network is told at index i: int64 [N], on the device of x [N, ...]."""
    return torch.full((len(x),), int(schedule.timestep_map[i]), dtype=torch.int64, device=x.device)


def split_output(out: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Predicted noise and, where the variance is learned, its interpolation v."""
    return out[:, :channels], out[:, channels:] if out.shape[1] > channels else None


def ancestral_step(model: Denoiser, schedule: Schedule, i: int, x: Tensor, noise: Tensor, clip: bool) -> Tensor:
    """x_{t-1} from x_t (Ho et al. 2020, algorithm 2); with `clip`, x_0 is clamped to [-1, 1] on the way."""
    eps, v = split_output(model(x, timesteps_at(schedule, i, x)), x.shape[1])
    x0 = pred_xstart(schedule, i, x, eps)
    if clip:
        x0 = x0.clamp(-1, 1)
    return posterior_sample(schedule, i, x0, x, v, noise)


def ancestral(
    model: Denoiser,
    schedule: Schedule,
    x: Tensor,
    noise: NoiseSource,
    start: int | None = None,
    clip: bool = True,
) -> Iterator[Tensor]:
    """Yield x after each of the `start` (default: all) reverse steps; step k = 1, 2, ... draws `noise(k)`."""
    start = len(schedule) if start is None else start
    for k, i in enumerate(reversed(range(start)), 1):
        x = ancestral_step(model, schedule, i, x, noise(k), clip)
        yield x
