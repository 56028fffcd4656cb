"""The hybrid loss against torch.distributions, term by term."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from sda_fast.diffusion import Schedule
from sda_fast.diffusion.losses import hybrid_loss
from sda_fast.diffusion.samplers import q_sample

SCHEDULE = Schedule.linear("100")
SHAPE = (2, 3, 4, 4)


@pytest.fixture
def case():
    """(out, x0, noise) with x0 made of 8-bit values, the extreme ones among them."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(0, 256, SHAPE, generator=generator) / 127.5 - 1
    x0[:, 0, 0, :2] = torch.tensor([-1.0, 1.0])
    out = torch.cat([torch.randn(SHAPE, generator=generator), torch.rand(SHAPE, generator=generator) * 2 - 1], dim=1)
    return out, x0, torch.randn(SHAPE, generator=generator)


def mean_and_deviation(i, out, x_t):
    """Of p(x_{t-1} | x_t), from the schedule's tables in float64."""
    eps, v = out.double().chunk(2, dim=1)
    x0 = SCHEDULE.sqrt_recip_alphas_cumprod[i] * x_t - SCHEDULE.sqrt_recipm1_alphas_cumprod[i] * eps
    mean = SCHEDULE.posterior_mean_coef1[i] * x0 + SCHEDULE.posterior_mean_coef2[i] * x_t
    low, high = SCHEDULE.posterior_log_variance_clipped[i], SCHEDULE.betas[i].log()
    return mean, ((v + 1) / 2 * high + (1 - v) / 2 * low).mul(0.5).exp()


@pytest.mark.parametrize("i", [0, 1, 40, 99])
def test_value(case, i):
    out, x0, noise = case
    x_t = q_sample(SCHEDULE, i, x0, noise)
    p = Normal(*mean_and_deviation(i, out, x_t.double()))
    if i == 0:
        upper = torch.where(x0 > 0.999, 1.0, p.cdf(x0.double() + 1 / 255))
        lower = torch.where(x0 < -0.999, 0.0, p.cdf(x0.double() - 1 / 255))
        bound = -(upper - lower).clamp_min(1e-12).log()
    else:
        mean = SCHEDULE.posterior_mean_coef1[i] * x0.double() + SCHEDULE.posterior_mean_coef2[i] * x_t.double()
        bound = kl_divergence(Normal(mean, SCHEDULE.posterior_variance[i].sqrt()), p)
    simple = (out[:, :3] - noise).square().mean((1, 2, 3))
    expected = simple + 0.001 * 100 * bound.mean((1, 2, 3)) / math.log(2)
    loss = hybrid_loss(out, x0, x_t, noise, torch.tensor([i, i]), SCHEDULE)
    assert loss.shape == (2,)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-3, atol=1e-4)


def test_images_may_stand_at_different_indices(case):
    out, x0, noise = case
    x_t = torch.cat([q_sample(SCHEDULE, i, x0[j : j + 1], noise[j : j + 1]) for j, i in enumerate((0, 60))])
    together = hybrid_loss(out, x0, x_t, noise, torch.tensor([0, 60]), SCHEDULE)
    for j, i in enumerate((0, 60)):
        one = slice(j, j + 1)
        alone = hybrid_loss(out[one], x0[one], x_t[one], noise[one], torch.tensor([i]), SCHEDULE)
        torch.testing.assert_close(together[one], alone)


def test_the_bound_trains_the_variance_only(case):
    out, x0, noise = case
    x_t = q_sample(SCHEDULE, 40, x0, noise)
    out = out.requires_grad_()
    (gradient,) = torch.autograd.grad(hybrid_loss(out, x0, x_t, noise, torch.tensor([40, 40]), SCHEDULE).sum(), out)
    torch.testing.assert_close(gradient[:, :3], 2 * (out.detach()[:, :3] - noise) / noise[0].numel())
    assert gradient[:, 3:].abs().min() > 0


def test_min_snr_weighs_the_noise_term(case):
    out, x0, noise = case
    for i in (1, 40, 99):
        x_t, index = q_sample(SCHEDULE, i, x0, noise), torch.tensor([i, i])
        simple = (out[:, :3] - noise).square().mean((1, 2, 3))
        snr = (SCHEDULE.alphas_cumprod[i] / (1 - SCHEDULE.alphas_cumprod[i])).item()
        plain = hybrid_loss(out, x0, x_t, noise, index, SCHEDULE)
        weighed = hybrid_loss(out, x0, x_t, noise, index, SCHEDULE, min_snr=5.0)
        torch.testing.assert_close(plain - weighed, (1 - min(snr, 5.0) / snr) * simple, rtol=1e-4, atol=1e-5)
