"""The adaptive layer norm and gated residual of DiT, plainly: the oracle of the operators in `sda_fast.ops.modulate`.

Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023, section 3.2 (adaLN-Zero).
Everything is computed in float32, or in float64 where x is float64.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, dtype: torch.dtype | None = None) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift in `dtype`, by default x's; x [N, T, C], shift and scale [N, C]."""
    wide, shift, scale = widen(x, shift, scale)
    normalised = F.layer_norm(wide, x.shape[-1:], eps=eps)
    return (normalised * (1 + scale[:, None]) + shift[:, None]).to(dtype or x.dtype)


def gate_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate y; x and y [N, T, C], gate [N, C]."""
    wide, gate, y = widen(x, gate, y)
    return (wide + gate[:, None] * y).to(x.dtype)


def widen(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
