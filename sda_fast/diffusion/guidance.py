"""DDA's low-pass guidance (Gao et al. 2023, algorithm 1), arranged so that a batch never couples its images."""

from typing import Literal

import torch
from torch import Tensor

from sda_fast.diffusion.lowpass import LowPass, group_norms, reciprocal
from sda_fast.diffusion.samplers import Denoiser, posterior_sample, pred_xstart, split_output, timesteps_at
from sda_fast.diffusion.schedule import Schedule

Norm = Literal["image", "batch"]


def guided_gradient(
    model: Denoiser, schedule: Schedule, lowpass: LowPass, i: int, x: Tensor, reference_down: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """One network pass forward and one back.

    x [N, C, n, n], reference_down [N, C, n/D, n/D]. Returns the clamped x_0, v, the *unnormalised* gradient g
    [N, C, n, n] and ||phi(d)||^2 [N]: d ||phi(reference) - phi(x_0)|| / dx_t = -g / ||phi(d)||. Leaving the norm out
    keeps the network part independent for each image, and its numbers near one.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        eps, v = split_output(model(x, timesteps_at(schedule, i, x)), x.shape[1])
    with torch.no_grad():
        raw = pred_xstart(schedule, i, x, eps)
        x0 = raw.clamp(-1, 1)
        smooth, squares = lowpass.residual(reference_down, x0)
        cotangent = smooth * ((raw >= -1) & (raw <= 1))
        a = schedule.sqrt_recip_alphas_cumprod[i].item()
        b = schedule.sqrt_recipm1_alphas_cumprod[i].item()
    (through_network,) = torch.autograd.grad(eps, x, cotangent)
    return x0, None if v is None else v.detach(), a * cotangent - b * through_network, squares


def guidance_weights(squares: Tensor, norm: Norm, norm_group: int) -> Tensor:
    """What the unnormalised gradient of each image is divided by, inverted: [N] -> [N], zero for a zero residual.

    "image": sqrt(norm_group) ||phi(d)|| of the image itself, the published strength for batches of `norm_group`
    without their coupling. "batch": the joint norm of consecutive groups of `norm_group`, the published code.
    """
    if norm == "image":
        return reciprocal((norm_group * squares).sqrt())
    return reciprocal(group_norms(squares, norm_group)).repeat_interleave(norm_group)[: len(squares)]


def guided_step(
    model: Denoiser,
    schedule: Schedule,
    lowpass: LowPass,
    i: int,
    x: Tensor,
    reference_down: Tensor,
    noise: Tensor,
    scale: float,
    norm: Norm,
    norm_group: int,
    real: int | None = None,
) -> Tensor:
    """x_{t-1} = ancestral draw - scale d||phi(reference) - phi(x_0)||/dx_t; all images [N, C, n, n].

    Only the first `real` images count in a joint norm; the others are padding.
    """
    x0, v, g, squares = guided_gradient(model, schedule, lowpass, i, x, reference_down)
    if real is not None and real < len(squares):
        squares = squares.clone()
        squares[real:] = 0
    weights = guidance_weights(squares, norm, norm_group)[:, None, None, None]
    return posterior_sample(schedule, i, x0, x, v, noise) + scale * weights * g
