"""Reverse steps against DiT's own samples and against the reference, on models that are plain functions."""

import pytest
import torch

from sda_fast.diffusion import Schedule
from sda_fast.diffusion.samplers import ReverseSteps, ancestral, ancestral_step, q_sample
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
                lambda k: {"noise": tensors["noise"][k - 1]},
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
    steps = ancestral(toy(learned), Schedule.linear("20"), x, lambda k: {"noise": noise[k - 1]}, start=7, clip=clip)
    for ours, theirs in zip(steps, expected, strict=True):
        torch.testing.assert_close(ours, theirs.sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("i", [0, 3, 19])
def test_noising_is_that_of_the_reference(i):
    schedule, x0, noise = Schedule.linear("20"), draw(*SHAPE), draw(*SHAPE, seed=1)
    x = q_sample(schedule, i, x0, noise)
    torch.testing.assert_close(x, reference_q_sample(linear_schedule("20"), x0, torch.tensor([i, i]), noise))


@pytest.mark.parametrize(("v", "table"), [(-1.0, "posterior_variance"), (1.0, "betas"), (None, "betas")])
def test_variance_lies_between_its_two_tables(v, table):
    steps, zero = ReverseSteps(Schedule.linear("100"), 41), torch.zeros(SHAPE)
    out = zero if v is None else torch.cat([zero, torch.full(SHAPE, v)], 1)
    ones = {"noise": torch.ones(SHAPE)}
    sample = ancestral_step(lambda x, t: out, steps, next(iter(steps)), zero, ones, clip=True)
    expected = float(getattr(Schedule.linear("100"), table)[40]) ** 0.5
    torch.testing.assert_close(sample, torch.full(SHAPE, expected))


def test_the_last_step_adds_no_noise():
    x, nothing = draw(*SHAPE), {"noise": torch.full(SHAPE, torch.nan)}
    steps = ReverseSteps(Schedule.linear("10"), 1)
    assert ancestral_step(toy(True), steps, next(iter(steps)), x, nothing, clip=True).isfinite().all()


def test_reverse_steps():
    steps = ReverseSteps(Schedule.linear("10"), 3)
    assert [position.tolist() for position in steps] == [[2, 1], [1, 2], [0, 3]]
    assert len(steps) == 3
    assert len(ReverseSteps(Schedule.linear("10"))) == 10


def test_every_step_draws_its_own_noise_and_is_told_its_original_timestep():
    told, drawn, schedule = [], [], Schedule.linear("10")

    def model(x, timesteps):
        told.append(timesteps.tolist())
        return torch.zeros_like(x)

    def noise(k):
        drawn.append(k)
        return {"noise": torch.zeros(SHAPE)}

    assert len(list(ancestral(model, schedule, torch.zeros(SHAPE), noise, start=3))) == 3
    assert told == [[222, 222], [111, 111], [0, 0]]
    assert drawn == [1, 2, 3]
    assert len(list(ancestral(model, schedule, torch.zeros(SHAPE), noise))) == len(schedule)
