"""GroupNorm, scale and shift per image and SiLU, plainly: the oracle of the operator `group_norm_silu`.

Source: Wu and He, "Group normalization", 2018, equations 1 to 3; scale and shift as in Dhariwal and Nichol, "Diffusion
models beat GANs", 2021, section 3.1 (AdaGN). Everything is computed in float32, or in float64 where x is float64.
"""

import torch
from torch import Tensor


def group_norm_statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """x [N, C, ...] -> the mean and the reciprocal standard deviation of every group, both [N, groups]."""
    members = x.to(_precision(x)).reshape(len(x), groups, x[:1].numel() // groups)
    variance, mean = torch.var_mean(members, dim=2, correction=0)
    return mean, (variance + eps).rsqrt()


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int = 32,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    x_bias: Tensor | None = None,
) -> Tensor:
    """silu(GroupNorm(x + x_bias) (1 + scale) + shift): x [N, C, ...], weight, bias and x_bias [C], scale and shift
    [N, C] or None."""
    raised = add_channels(x, x_bias)
    u, _, _ = _before_silu(raised, weight, bias, *group_norm_statistics(raised, groups, eps), scale, shift)
    return (u * u.sigmoid() if silu else u).to(x.dtype)


def group_norm_silu_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    silu: bool = True,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The gradient with respect to x, from dy, that with respect to y, and the statistics [N, groups]; plus
    `residual`."""
    u, normalised, gain = _before_silu(add_channels(x, x_bias), weight, bias, mean, rstd, scale, shift)
    du = dy.to(u.dtype)
    if silu:
        du = du * u.sigmoid() * (1 + u * (1 - u.sigmoid()))
    members, cotangent = normalised.reshape(*mean.shape, -1), (du * gain).reshape(*mean.shape, -1)
    along = (cotangent * members).mean(dim=2, keepdim=True)
    dx = rstd[:, :, None] * (cotangent - cotangent.mean(dim=2, keepdim=True) - members * along)
    dx = dx.reshape(x.shape)
    return (dx if residual is None else dx + residual.to(dx.dtype)).to(x.dtype)


def add_channels(x: Tensor, x_bias: Tensor | None) -> Tensor:
    """x [N, C, ...] plus x_bias [C], not rounded to x's dtype; x itself where there is none."""
    if x_bias is None:
        return x
    precision = _precision(x)
    return x.to(precision) + x_bias.to(precision).reshape(-1, *[1] * (x.dim() - 2))


def _before_silu(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What SiLU is applied to, the normalised x, and the derivative of the former by the latter [N, C, 1, ...]."""
    precision, members = _precision(x), x.shape[1] // mean.shape[1]
    per_channel = (len(x), x.shape[1], *[1] * (x.dim() - 2))
    mean, rstd = (s.repeat_interleave(members, dim=1).reshape(per_channel) for s in (mean, rstd))
    gain, offset = (p.to(precision).expand(len(x), -1) for p in (weight, bias))
    if scale is not None:
        gain, offset = gain * (1 + scale.to(precision)), offset * (1 + scale.to(precision))
    if shift is not None:
        offset = offset + shift.to(precision)
    gain, offset = gain.reshape(per_channel), offset.reshape(per_channel)
    normalised = (x.to(precision) - mean) * rstd
    return normalised * gain + offset, normalised, gain


def _precision(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
