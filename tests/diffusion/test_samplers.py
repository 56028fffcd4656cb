"""Reverse steps against DiT's own samples and against the reference, on models that are plain functions."""

import pytest
import torch

from sda_fast.diffusion import Schedule
from sda_fast.diffusion.samplers import ancestral, ancestral_step, posterior_sample, pred_xstart, q_sample
from sda_fast.models import DiT
from sda_fast.reference import ancestral as reference_ancestral
from sda_fast.reference import linear_schedule
from sda_fast.reference import q_sample as reference_q_sample

SHAPE = (2, 3, 8, 8)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def toy(learned):
    """A model whose output depends on every pixel's own value and on the timestep."""

    def model(x, timesteps):
        shift = (timesteps.float() / 1000)[:, None, None, None]
        eps = torch.sin(2 * x) + shift
        return torch.cat([eps, torch.cos(x - shift)], dim=1) if learned else eps

    return model


def test_ten_steps_match_the_original(load_reference, load_weights):
    tensors, meta = load_reference("dit_tiny")
    dit = DiT(**meta["config"]).eval()
    dit.load_state_dict(load_weights(tensors))
    schedule = Schedule.linear(meta["respacing"])
    with torch.no_grad():
        steps = list(
            ancestral(
                lambda x, t: dit(x, t, tensors["y"]),
                schedule,
                tensors["x"],
                lambda k: tensors["noise"][k - 1],
                clip=False,
            )
        )
    errors = [float((x - y).norm() / y.norm()) for x, y in zip(steps, tensors["samples"], strict=True)]
    assert len(errors) == 10
    assert max(errors) <= 1e-4, errors


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("learned", [True, False])
def test_steps_are_those_of_the_reference(learned, clip):
    noise, x = draw(7, *SHAPE, seed=1), draw(*SHAPE)
    variance = "learned_range" if learned else "fixed_large"
    expected = reference_ancestral(toy(learned), x, noise, "20", start=7, clip=clip, variance=variance)
    steps = ancestral(toy(learned), Schedule.linear("20"), x, lambda k: noise[k - 1], start=7, clip=clip)
    for ours, theirs in zip(steps, expected, strict=True):
        torch.testing.assert_close(ours, theirs.sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("i", [0, 3, 19])
def test_noising_is_that_of_the_reference_and_is_undone_by_the_noise(i):
    schedule, x0, noise = Schedule.linear("20"), draw(*SHAPE), draw(*SHAPE, seed=1)
    x = q_sample(schedule, i, x0, noise)
    torch.testing.assert_close(x, reference_q_sample(linear_schedule("20"), x0, torch.tensor([i, i]), noise))
    torch.testing.assert_close(pred_xstart(schedule, i, x, noise), x0, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("v", "table"), [(-1.0, "posterior_variance"), (1.0, "betas"), (None, "betas")])
def test_variance_lies_between_its_two_tables(v, table):
    schedule, zero = Schedule.linear("100"), torch.zeros(SHAPE)
    channel = None if v is None else torch.full(SHAPE, v)
    sample = posterior_sample(schedule, 40, zero, zero, channel, torch.ones(SHAPE))
    torch.testing.assert_close(sample, torch.full(SHAPE, float(getattr(schedule, table)[40]) ** 0.5))


def test_the_last_step_adds_no_noise():
    x, nothing = draw(*SHAPE), torch.full(SHAPE, torch.nan)
    assert ancestral_step(toy(True), Schedule.linear("10"), 0, x, nothing, clip=True).isfinite().all()


def test_every_step_draws_its_own_noise_and_is_told_its_original_timestep():
    told, drawn, schedule = [], [], Schedule.linear("10")

    def model(x, timesteps):
        told.append(timesteps.tolist())
        return torch.zeros_like(x)

    def noise(k):
        drawn.append(k)
        return torch.zeros(SHAPE)

    assert len(list(ancestral(model, schedule, torch.zeros(SHAPE), noise, start=3))) == 3
    assert told == [[222, 222], [111, 111], [0, 0]]
    assert drawn == [1, 2, 3]
    assert len(list(ancestral(model, schedule, torch.zeros(SHAPE), noise))) == len(schedule)
