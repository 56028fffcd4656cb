"""Single guided steps against SDA's trajectories, and what the guidance is divided by."""

import pytest
import torch

from sda_fast.diffusion import LowPass, Schedule
from sda_fast.diffusion.guidance import guided_step
from sda_fast.diffusion.samplers import ReverseSteps, q_sample
from sda_fast.models import ADM
from sda_fast.reference import guided_step as reference_step
from sda_fast.reference import linear_schedule


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear_model(channels):
    """Mixes neighbouring pixels, so that the gradient through it is not that of a single pixel."""

    def model(x, timesteps):
        eps = 0.5 * x + 0.25 * x.roll(1, -1) + 0.1 * x.roll(2, -2)
        return eps if channels == 3 else torch.cat([eps, torch.tanh(x)], dim=1)

    return model


def step(model, schedule, lowpass, i, x, reference_down, noise, *guidance):
    """One guided step at index i with the noise given."""
    steps = ReverseSteps(schedule, i + 1)
    position = next(iter(steps))
    return guided_step(model, lowpass, steps, position, x, reference_down, {"noise": noise}, *guidance)


@pytest.mark.parametrize(("name", "norm_group"), [("dda_batch2", 2), ("dda_batch1", 1)])
def test_every_single_step_matches_the_original(load_reference, load_weights, name, norm_group):
    weights, config = load_reference("adm_tiny")
    adm = ADM(**config["config"]).eval()
    adm.load_state_dict(load_weights(weights))
    tensors, meta = load_reference(name)
    schedule, lowpass = Schedule.linear(meta["respacing"]), LowPass(adm.image_size, meta["factor"])
    reference, noise, start = tensors["reference"], tensors["noise"].float(), meta["start_step"]
    down, scale = lowpass.down(reference), meta["scale"]
    x = q_sample(schedule, start, reference, noise[0])
    errors, steps = [], ReverseSteps(schedule, start)
    for k, (position, expected) in enumerate(zip(steps, tensors["samples"], strict=True), 1):
        draw = {"noise": noise[k]}
        ours = guided_step(adm, lowpass, steps, position, x, down, draw, scale, "batch", norm_group)
        errors.append(float((ours - expected).abs().mean()))
        x = expected
    assert len(errors) == 50
    assert max(errors) <= 1e-6, (
        f"largest mean error of a step {max(errors):.1e}, at step {errors.index(max(errors)) + 1}"
    )


@pytest.mark.parametrize(("channels", "variance"), [(6, "learned_range"), (3, "fixed_large")])
@pytest.mark.parametrize("i", [0, 7, 30])
def test_a_step_is_that_of_the_reference(i, channels, variance):
    schedule, lowpass, model = Schedule.linear("50"), LowPass(24, 3), linear_model(channels)
    x, reference, noise = draw(3, 3, 24, 24), draw(3, 3, 24, 24, seed=1).clamp(-1, 1), draw(3, 3, 24, 24, seed=2)
    indices = torch.full((3,), i)
    expected = reference_step(linear_schedule("50"), model, x, indices, noise, reference, 3, 4.0, variance)
    ours = step(model, schedule, lowpass, i, x, lowpass.down(reference), noise, 4.0, "batch", 3)
    torch.testing.assert_close(ours, expected.sample, rtol=1e-4, atol=1e-5)


def test_no_guidance_comes_from_where_the_prediction_is_clamped():
    # x_0 = 3 in the left half is clamped; this model is linear in x pixel by pixel, so nothing leaks across.
    schedule, lowpass = Schedule.linear("100"), LowPass(8, 2)
    target = torch.zeros(1, 3, 8, 8)
    target[..., :4] = 3.0
    x = q_sample(schedule, 20, target, torch.zeros_like(target))
    down, still = lowpass.down(torch.full_like(x, 0.5)), torch.zeros_like(x)

    def at(scale):
        return step(lambda x, t: 0 * x, schedule, lowpass, 20, x, down, still, scale, "image", 1)

    g = at(6.0) - at(0.0)
    assert not g[..., :4].any()
    assert (g[..., 4:] != 0).all()


def test_without_a_residual_there_is_no_guidance():
    schedule, lowpass = Schedule.linear("100"), LowPass(8, 2)
    x = torch.zeros(2, 3, 8, 8)
    for norm in ("image", "batch"):
        sample = step(lambda x, t: 0 * x, schedule, lowpass, 20, x, lowpass.down(x), x, 6.0, norm, 2)
        assert not sample.any()


def test_padding_counts_in_no_norm():
    schedule, lowpass, model = Schedule.linear("50"), LowPass(8, 2), linear_model(6)
    x, reference, noise = (draw(4, 3, 8, 8, seed=seed) for seed in range(3))

    def first(images, real):
        few = (x[:images], lowpass.down(reference[:images]), noise[:images])
        return step(model, schedule, lowpass, 10, *few, 6.0, "batch", 2, real)

    padded, alone = first(4, 3), first(3, None)
    torch.testing.assert_close(padded[:3], alone, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(padded[2], first(4, None)[2])
    assert padded.isfinite().all()
