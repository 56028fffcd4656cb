"""DDA's low-pass guidance (Gao et al. 2023, algorithm 1), arranged so that a batch never couples its images."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sda_fast.diffusion.lowpass import LowPass
from sda_fast.diffusion.samplers import Denoiser, Draw, ReverseSteps
from sda_fast.ops import guidance, reverse_step

Norm = Literal["image", "batch"]


class Guided(NamedTuple):
    """What the network says of x_t [N, C, n, n]: everything but noise that `reverse_step` wants of a guided step."""

    out: Tensor  # the network's output, [N, C or 2C, n, n]
    cotangent: Tensor  # S(d) of the clamped x_0, zero where it was clamped, [N, C, n, n]
    through_network: Tensor  # the vector-Jacobian product of `cotangent` through the predicted noise, [N, C, n, n]
    squares: Tensor  # ||phi(d)||^2, float32 [N]


def guide(
    model: Callable[[Tensor], Tensor],
    lowpass: LowPass,
    x: Tensor,
    reference_down: Tensor,
    table: Tensor,
    position: Tensor,
    scale_cotangent: bool = False,
) -> Guided:
    """One network pass forward and one back, of the *unnormalised* gradient: so the network treats every image by
    itself, in numbers near one, and `reverse_step` divides by the norm.

    model: from x_t, float32 [N, C, n, n], to the network's output. reference_down [N, C, n/D, n/D] is
    `lowpass.down(reference)`; table and position are those of `ReverseSteps`. scale_cotangent: send back each image's
    gradient times the power of two that brings its largest element to [1, 2), and divide it off again, which loses
    nothing and keeps float16 networks away from the end of their range.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        out = model(leaf)
        eps = out[:, : x.shape[1]]
    out = out.detach()
    down, _, gram = lowpass.matrices(x)
    cotangent, squares = guidance(x, out, reference_down, down, gram, table, position)
    factor = _power_of_two(cotangent) if scale_cotangent else None
    (through_network,) = torch.autograd.grad(eps, leaf, cotangent if factor is None else cotangent * factor)
    return Guided(out, cotangent, through_network if factor is None else through_network / factor, squares)


def guide_without_jacobian(
    lowpass: LowPass, x: Tensor, out: Tensor, reference_down: Tensor, table: Tensor, position: Tensor
) -> Guided:
    """`guide` as if the predicted noise did not depend on x_t, an approximation: nothing goes back through the network,
    and dx_0/dx_t is what stands before x_t in x_0.

    out: the network's output for x, [N, C or 2C, n, n]; the rest as for `guide`.
    """
    down, _, gram = lowpass.matrices(x)
    cotangent, squares = guidance(x, out, reference_down, down, gram, table, position)
    return Guided(out, cotangent, torch.zeros_like(cotangent), squares)


def _power_of_two(cotangent: Tensor) -> Tensor:
    """[N, 1, 1, 1]: what brings the largest element of each image to [1, 2), up to float32's own range of powers."""
    largest = cotangent.abs().amax((1, 2, 3), keepdim=True)
    return torch.exp2(-torch.floor(torch.log2(largest)).clamp(min=-126))  # of zero as well


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

    reference_down as for `guide`; norm, norm_group and real as for `reverse_step`.
    """
    timesteps = steps.timesteps(position, x)
    terms = guide(lambda x: model(x, timesteps), lowpass, x, reference_down, steps.table, position)
    return finish(x, terms, steps, position, draw, scale, norm, norm_group, real)


def finish(
    x: Tensor,
    terms: Guided,
    steps: ReverseSteps,
    position: Tensor,
    draw: Draw,
    scale: float,
    norm: Norm,
    norm_group: int,
    real: int | None = None,
) -> Tensor:
    """The rest of `guided_step`, from what `guide` found: one pass over memory."""
    return reverse_step(
        x,
        terms.out,
        steps.table,
        position,
        cotangent=terms.cotangent,
        through_network=terms.through_network,
        squares=terms.squares,
        scale=scale,
        norm=norm,
        norm_group=norm_group,
        real=real,
        **draw,
    )
