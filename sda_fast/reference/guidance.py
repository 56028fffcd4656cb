"""Low-pass guidance, plainly: the oracle of the operator `guidance`.

Source: Gao et al., "Back to the Source: Diffusion-Driven Adaptation to Test-Time Corruption", CVPR 2023, algorithm 1,
with phi as matrices and without the division by ||phi(d)||.
"""

import torch
from torch import Tensor


def guidance_residual(x0: Tensor, reference_down: Tensor, down: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """S(d) = phi^T phi d [N, C, n, n] and ||phi(d)||^2 [N] of d = reference - x0, given P reference P^T."""
    low = reference_down - down @ x0 @ down.T  # P d P^T, [N, C, m, m]
    smooth = gram @ low @ gram
    return down.T @ smooth @ down, (low * smooth).sum((1, 2, 3))


def guidance(
    x: Tensor, out: Tensor, reference_down: Tensor, down: Tensor, gram: Tensor, table: Tensor, position: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """cotangent, squares and x0 of x_t = x [N, C, n, n] and the network's output out [N, C or 2C, n, n]."""
    coefficients = table.index_select(0, position[:1])[0]  # on the device, without waiting for it
    eps = out[:, : x.shape[1]].to(x.dtype)
    raw = coefficients[0] * x - coefficients[1] * eps
    x0 = raw.clamp(-1, 1)
    gradient, squares = guidance_residual(x0, reference_down, down, gram)
    cotangent = torch.where((raw >= -1) & (raw <= 1), gradient, 0)
    return cotangent.to(out.dtype), squares, x0
