"""DDA's low-pass guidance (Gao et al. 2023, algorithm 1), arranged so that a batch never couples its images."""

from typing import Literal

import torch
from torch import Tensor

from sda_fast.diffusion.lowpass import LowPass
from sda_fast.diffusion.samplers import Denoiser, Draw, ReverseSteps
from sda_fast.ops import guidance, reverse_step

Norm = Literal["image", "batch"]


def guided_step(
    model: Denoiser,
    lowpass: LowPass,
    steps: ReverseSteps,
    position: Tensor,
    x: Tensor,
    reference_down: Tensor,
    draw: Draw,
    scale: float,
    norm: Norm,
    norm_group: int,
    real: int | None = None,
) -> Tensor:
    """x_{t-1} = ancestral draw - scale d||phi(reference) - phi(x_0)||/dx_t; images [N, C, n, n], x float32.

    reference_down [N, C, n/D, n/D] is `lowpass.down(reference)`. One network pass forward and one back, of the
    *unnormalised* gradient: so the network treats every image by itself, in numbers near one, and `reverse_step`
    divides by the norm (for `norm`, `norm_group` and `real` see there).
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        out = model(x, steps.timesteps(position, x))
        eps = out[:, : x.shape[1]]
    down, _, gram = lowpass.matrices(x)
    cotangent, squares = guidance(x.detach(), out.detach(), reference_down, down, gram, steps.table, position)
    (through_network,) = torch.autograd.grad(eps, x, cotangent)
    through_network = through_network.to(cotangent.dtype)  # of a network in half precision
    return reverse_step(
        x.detach(),
        out.detach(),
        steps.table,
        position,
        cotangent=cotangent,
        through_network=through_network,
        squares=squares,
        scale=scale,
        norm=norm,
        norm_group=norm_group,
        real=real,
        **draw,
    )
