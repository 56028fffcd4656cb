"""The diffusion of guided-diffusion and the samplers of DDA, SDA, DiffPure and DiT, at the published cost.

Notation of Ho et al. 2020 ("Denoising Diffusion Probabilistic Models") and Nichol and Dhariwal 2021
("Improved Denoising Diffusion Probabilistic Models"). Images are float32 [N, C, H, W] in [-1, 1]. An index
i counts the steps of the respaced process, 0 is the cleanest; the model is told the step of the base
process, `timestep_map[i]`, as an integer and not rescaled. Tables are float64; a value is rounded to
float32 where it is used.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .resize import low_pass

Model = Callable[[Tensor, Tensor], Tensor]  # (x [N, C, H, W], timesteps [N]) -> [N, C or 2C, H, W]
Variance = Literal["learned_range", "fixed_small", "fixed_large"]
Table = NDArray[np.float64]


def spaced_steps(base_steps: int, respacing: str) -> list[int]:
    """The base steps that a respacing string keeps, ascending.

    "ddim25": every k-th step from 0, with the integer stride k that yields exactly 25. "10,15,20": the base
    process is cut into as many sections (longer ones first if it does not divide), and from each that many
    steps are taken, evenly from its first to its last. "100" is a single such section. Raises ValueError if
    it cannot be done.
    """
    if respacing.startswith("ddim"):
        count = int(respacing.removeprefix("ddim"))
        for stride in range(1, base_steps):
            if len(range(0, base_steps, stride)) == count:
                return list(range(0, base_steps, stride))
        raise ValueError(f"no integer stride takes {count} of {base_steps} steps")
    counts = [int(c) for c in respacing.split(",")]
    length, longer = divmod(base_steps, len(counts))
    steps, begin = [], 0
    for section, count in enumerate(counts):
        size = length + (section < longer)
        if count > size:
            raise ValueError(f"cannot take {count} steps from a section of {size}")
        gap = 1.0 if count <= 1 else (size - 1) / (count - 1)
        position = 0.0  # summed up, not multiplied: where rounding decides, it must decide as in the original
        for _ in range(count):
            steps.append(begin + round(position))
            position += gap
        begin += size
    return steps


@dataclass(frozen=True)
class Schedule:
    """float64 tables [T] of a respaced process; `timestep_map` int64 [T] holds the base steps."""

    timestep_map: NDArray[np.int64]
    betas: Table
    alphas_cumprod: Table
    alphas_cumprod_prev: Table
    sqrt_alphas_cumprod: Table
    sqrt_one_minus_alphas_cumprod: Table
    sqrt_recip_alphas_cumprod: Table
    sqrt_recipm1_alphas_cumprod: Table
    posterior_variance: Table
    posterior_log_variance_clipped: Table
    posterior_mean_coef1: Table
    posterior_mean_coef2: Table

    def __len__(self) -> int:
        return len(self.betas)


def linear_schedule(respacing: str = "", base_steps: int = 1000) -> Schedule:
    """Betas from 1e-4 to 2e-2 over 1000 steps (for another number of steps both ends scale), then respaced.

    Respacing keeps abar at the kept steps: beta_i = 1 - abar_i / abar_{i-1}. Needs two steps.
    """
    steps = spaced_steps(base_steps, respacing or str(base_steps))
    if len(steps) < 2:
        raise ValueError(f"respacing {respacing!r} leaves fewer than two steps")
    ends = 1000 / base_steps
    base_abar = np.cumprod(1 - np.linspace(ends * 1e-4, ends * 2e-2, base_steps))[steps]
    beta = 1 - base_abar / np.append(1.0, base_abar[:-1])

    # From the respaced betas on, as if they had been given: abar is multiplied up anew, as the original does.
    abar = np.cumprod(1 - beta)
    prev = np.append(1.0, abar[:-1])
    variance = beta * (1 - prev) / (1 - abar)  # betatilde; 0 at index 0, so its log is clipped to index 1's
    return Schedule(
        timestep_map=np.array(steps, dtype=np.int64),
        betas=beta,
        alphas_cumprod=abar,
        alphas_cumprod_prev=prev,
        sqrt_alphas_cumprod=np.sqrt(abar),
        sqrt_one_minus_alphas_cumprod=np.sqrt(1 - abar),
        sqrt_recip_alphas_cumprod=np.sqrt(1 / abar),
        sqrt_recipm1_alphas_cumprod=np.sqrt(1 / abar - 1),
        posterior_variance=variance,
        posterior_log_variance_clipped=np.log(np.append(variance[1], variance[1:])),
        posterior_mean_coef1=beta * np.sqrt(prev) / (1 - abar),
        posterior_mean_coef2=(1 - prev) * np.sqrt(1 - beta) / (1 - abar),
    )


def gather(table: Table, i: Tensor) -> Tensor:
    """table[i] as float32 [N, 1, 1, 1]. As published, the whole table travels to the device on every use."""
    return torch.from_numpy(table).to(i.device)[i].float()[:, None, None, None]


def q_sample(s: Schedule, x_0: Tensor, i: Tensor, noise: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, at the indices `i` int64 [N]."""
    return gather(s.sqrt_alphas_cumprod, i) * x_0 + gather(s.sqrt_one_minus_alphas_cumprod, i) * noise


def p_mean_variance(
    s: Schedule, model: Model, x: Tensor, i: Tensor, clip: bool, variance: Variance = "learned_range"
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and log-variance of p(x_{t-1} | x_t), and the predicted x_0 (clamped to [-1, 1] if `clip`).

    "learned_range": the model returns [eps, v], and v in [-1, 1] interpolates the log-variance between
    betatilde_t and beta_t (Nichol and Dhariwal, eq. 15). "fixed_small" is betatilde_t, "fixed_large" beta_t
    (with betatilde_1 at index 0); for these the model returns eps alone.
    """
    out = model(x, torch.from_numpy(s.timestep_map).to(i.device)[i])
    if variance == "learned_range":
        eps, v = torch.split(out, x.shape[1], dim=1)
        fraction = (v + 1) / 2
        high, low = gather(np.log(s.betas), i), gather(s.posterior_log_variance_clipped, i)
        log_variance = fraction * high + (1 - fraction) * low
    else:
        large = np.log(np.append(s.posterior_variance[1], s.betas[1:]))
        table = {"fixed_small": s.posterior_log_variance_clipped, "fixed_large": large}[variance]
        eps, log_variance = out, gather(table, i)
    x_0 = gather(s.sqrt_recip_alphas_cumprod, i) * x - gather(s.sqrt_recipm1_alphas_cumprod, i) * eps
    x_0 = x_0.clamp(-1, 1) if clip else x_0
    mean = gather(s.posterior_mean_coef1, i) * x_0 + gather(s.posterior_mean_coef2, i) * x
    return mean, log_variance, x_0


class Step(NamedTuple):
    """What a reverse step yields: x_{t-1} and the prediction of x_0 it was made from, both like x_t."""

    sample: Tensor
    pred_xstart: Tensor


def p_sample(
    s: Schedule,
    model: Model,
    x: Tensor,
    i: Tensor,
    noise: Tensor,
    clip: bool = True,
    variance: Variance = "learned_range",
) -> Step:
    """x_{t-1} = mean + 1[t > 0] sigma_t noise."""
    mean, log_variance, x_0 = p_mean_variance(s, model, x, i, clip, variance)
    nonzero = (i != 0).float()[:, None, None, None]
    return Step(mean + nonzero * torch.exp(0.5 * log_variance) * noise, x_0)


@torch.enable_grad()
def guided_step(
    s: Schedule,
    model: Model,
    x: Tensor,
    i: Tensor,
    noise: Tensor,
    reference: Tensor,
    factor: int,
    scale: float,
    variance: Variance = "learned_range",
) -> Step:
    """One reverse step under the low-pass guidance of DDA (Gao et al. 2023).

    x_{t-1} -= w d/dx_t ||phi(reference) - phi(x_0)||_2 with w = `scale` and D = `factor`. The norm runs
    over the whole batch, so images share its strength; the gradient goes through the whole UNet and is zero
    where x_0 was clamped; at index 0 it is applied as at any other.
    """
    x = x.detach().requires_grad_()
    sample, x_0 = p_sample(s, model, x, i, noise, clip=True, variance=variance)
    difference = low_pass(reference, factor) - low_pass(x_0, factor)
    (gradient,) = torch.autograd.grad(torch.linalg.vector_norm(difference), x)
    return Step(sample.detach() - scale * gradient, x_0.detach())


def noise_source(like: Tensor, noise: Tensor | None, count: int) -> Callable[[int], Tensor]:
    """k -> the k-th of `count` given noises [count, N, C, H, W]; without any, a new draw, as published."""
    if noise is None:
        return lambda k: torch.randn_like(like)
    if noise.shape != (count, *like.shape):
        raise ValueError(f"noise has shape {tuple(noise.shape)}, needs {(count, *like.shape)}")
    return lambda k: noise[k]


def check_start(start: int, last: int, respacing: str) -> None:
    """Raise ValueError unless 1 <= start <= last."""
    if not 1 <= start <= last:
        raise ValueError(f"start must lie in 1..{last} for respacing {respacing!r}, not {start}")


def index_like(x: Tensor, i: int) -> Tensor:
    """The index of every image of the batch, int64 [N]."""
    return torch.tensor([i] * len(x), device=x.device)


def guided_projection(
    model: Model,
    images: Tensor,
    noise: Tensor | None = None,
    respacing: str = "100",
    start: int = 50,
    factor: int = 4,
    scale: float = 6.0,
    variance: Variance = "learned_range",
) -> Iterator[Step]:
    """Projection of `images` [N, C, H, W] as DDA and SDA publish it; yields after each of `start` steps.

    `noise` [start + 1, N, C, H, W], drawn from the global generator if None: noise[0] carries the images to
    index `start`, noise[k] belongs to the k-th reverse step. Off by one, as published: the images are noised
    to index `start`, while the first reverse step is told `start - 1`. Raises ValueError if `start` does not
    lie in 1..T-1 or the noise has another shape.
    """
    s = linear_schedule(respacing)
    check_start(start, len(s) - 1, respacing)
    draw = noise_source(images, noise, start + 1)
    x = q_sample(s, images, index_like(images, start), draw(0))
    for k, i in enumerate(reversed(range(start)), 1):
        step = guided_step(s, model, x, index_like(x, i), draw(k), images, factor, scale, variance)
        yield step
        x = step.sample


def ancestral(
    model: Model,
    x: Tensor,
    noise: Tensor | None = None,
    respacing: str = "250",
    start: int | None = None,
    clip: bool = False,
    variance: Variance = "learned_range",
) -> Iterator[Step]:
    """Unguided ancestral sampling; yields after each of `start` steps (default: all T).

    `x` stands at index start - 1; `noise` [start, N, C, H, W] holds one draw per step, in the order of use.
    DiT samples its latents so, without clipping.
    """
    s = linear_schedule(respacing)
    start = len(s) if start is None else start
    check_start(start, len(s), respacing)
    draw = noise_source(x, noise, start)
    for k, i in enumerate(reversed(range(start))):
        with torch.no_grad():
            step = p_sample(s, model, x, index_like(x, i), draw(k), clip, variance)
        yield step
        x = step.sample


def diffpure(
    model: Model,
    images: Tensor,
    noise: Tensor | None = None,
    respacing: str = "1000",
    start: int = 150,
    variance: Variance = "learned_range",
) -> Iterator[Step]:
    """DiffPure, "ddpm" variant (Nie et al. 2022): `start` steps of noise, then as many ancestral ones.

    Predictions of x_0 are clipped. `noise` is [start + 1, N, C, H, W]: noise[0] carries the images to index
    start - 1, where the reverse steps begin, noise[k] belongs to the k-th of them.
    """
    s = linear_schedule(respacing)
    check_start(start, len(s), respacing)
    draw = noise_source(images, noise, start + 1)
    x = q_sample(s, images, index_like(images, start - 1), draw(0))
    reverse_noise = None if noise is None else noise[1:]
    yield from ancestral(model, x, reverse_noise, respacing, start, clip=True, variance=variance)
