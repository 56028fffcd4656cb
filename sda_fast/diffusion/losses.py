"""The training loss of models that learn their variance (Nichol & Dhariwal 2021, equation 16)."""

import math

import torch
from torch import Tensor

from sda_fast.diffusion.schedule import Schedule


def _normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    return 0.5 * (logvar2 - logvar1 - 1.0 + (logvar1 - logvar2).exp() + (mean1 - mean2) ** 2 * (-logvar2).exp())


def _discretised_nll(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """Negative log-likelihood of 8-bit values x in [-1, 1], each the integral of its 1/127.5 wide bin."""

    def cdf(v: Tensor) -> Tensor:
        return 0.5 * (1.0 + torch.erf(v * (-0.5 * logvar).exp() / math.sqrt(2.0)))

    upper = torch.where(x > 0.999, 1.0, cdf(x - mean + 1 / 255))
    lower = torch.where(x < -0.999, 0.0, cdf(x - mean - 1 / 255))
    return -(upper - lower).clamp_min(1e-12).log()


def hybrid_loss(
    out: Tensor,
    x0: Tensor,
    x_t: Tensor,
    noise: Tensor,
    index: Tensor,
    schedule: Schedule,
    min_snr: float | None = None,
) -> Tensor:
    """L_simple + 0.001 L_vlb of each image, float32 [N].

    out [N, 2C, H, W]: predicted noise and variance interpolation; x0 in [-1, 1], x_t and noise [N, C, H, W];
    index int64 [N] into `schedule`. The bound trains the variance only: the mean is detached in it. min_snr weighs
    L_simple by min(SNR_t, min_snr) / SNR_t, SNR_t = abar_t / (1 - abar_t), towards high noise (Hang et al. 2023,
    section 3.3, for predicted noise).
    """

    def at(table: Tensor) -> Tensor:
        return table[index.cpu()].to(x0)[:, None, None, None]

    eps, v = out.float().chunk(2, dim=1)
    simple = (eps - noise).square().mean((1, 2, 3))
    if min_snr is not None:
        # 1 / SNR_t = 1 / abar_t - 1
        simple = simple * (min_snr * at(schedule.sqrt_recipm1_alphas_cumprod)[:, 0, 0, 0].square()).clamp_max(1)
    low, high = at(schedule.posterior_log_variance_clipped), at(schedule.betas.log())
    logvar = low + (v + 1) / 2 * (high - low)
    pred = at(schedule.sqrt_recip_alphas_cumprod) * x_t - at(schedule.sqrt_recipm1_alphas_cumprod) * eps.detach()
    coef1, coef2 = at(schedule.posterior_mean_coef1), at(schedule.posterior_mean_coef2)
    mean, true_mean = coef1 * pred + coef2 * x_t, coef1 * x0 + coef2 * x_t
    kl = _normal_kl(true_mean, low, mean, logvar)
    first = (index == 0)[:, None, None, None]
    bound = torch.where(first, _discretised_nll(x0, mean, logvar), kl).mean((1, 2, 3)) / math.log(2.0)
    # L_vlb is the sum over all steps, one of which is drawn here.
    return simple + 0.001 * len(schedule) * bound
