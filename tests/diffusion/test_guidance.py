"""Single guided steps against SDA's trajectories, and what the guidance is divided by."""

import pytest
import torch

from sda_fast.diffusion import LowPass, Schedule
from sda_fast.diffusion.guidance import guidance_weights, guided_gradient, guided_step
from sda_fast.diffusion.samplers import q_sample
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
    errors = []
    for k, expected in enumerate(tensors["samples"], 1):
        ours = guided_step(adm, schedule, lowpass, start - k, x, down, noise[k], scale, "batch", norm_group)
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
    ours = guided_step(model, schedule, lowpass, i, x, lowpass.down(reference), noise, 4.0, "batch", 3)
    torch.testing.assert_close(ours, expected.sample, rtol=1e-4, atol=1e-5)
    x0, v, _, squares = guided_gradient(model, schedule, lowpass, i, x, lowpass.down(reference))
    torch.testing.assert_close(x0, expected.pred_xstart, rtol=1e-4, atol=1e-5)
    assert (v is None) == (channels == 3)
    torch.testing.assert_close(squares, lowpass(reference - x0).square().sum((1, 2, 3)), rtol=1e-4, atol=1e-5)


def test_no_guidance_comes_from_where_the_prediction_is_clamped():
    # x_0 = 3 in the left half is clamped; this model is linear in x pixel by pixel, so nothing leaks across.
    schedule, lowpass = Schedule.linear("100"), LowPass(8, 2)
    target = torch.zeros(1, 3, 8, 8)
    target[..., :4] = 3.0
    x = q_sample(schedule, 20, target, torch.zeros_like(target))
    down = lowpass.down(torch.full_like(x, 0.5))
    _, _, g, _ = guided_gradient(lambda x, t: 0 * x, schedule, lowpass, 20, x, down)
    assert not g[..., :4].any()
    assert (g[..., 4:] != 0).all()


def test_without_a_residual_there_is_no_guidance():
    schedule, lowpass = Schedule.linear("100"), LowPass(8, 2)
    x = torch.zeros(2, 3, 8, 8)
    for norm in ("image", "batch"):
        step = guided_step(lambda x, t: 0 * x, schedule, lowpass, 20, x, lowpass.down(x), x, 6.0, norm, 2)
        assert not step.any()


def test_weights_in_closed_form():
    squares = torch.tensor([9.0, 16.0, 4.0, 0.0, 25.0])
    image = guidance_weights(squares, "image", 4)
    torch.testing.assert_close(image, torch.tensor([1 / 6, 1 / 8, 1 / 4, 0, 1 / 10]))
    batch = guidance_weights(squares, "batch", 2)  # the last group is one image
    torch.testing.assert_close(batch, torch.tensor([1 / 5, 1 / 5, 1 / 2, 1 / 2, 1 / 5]))
    assert torch.equal(guidance_weights(squares, "image", 1), guidance_weights(squares, "batch", 1))


def test_padding_counts_in_no_norm():
    schedule, lowpass, model = Schedule.linear("50"), LowPass(8, 2), linear_model(6)
    x, reference, noise = (draw(4, 3, 8, 8, seed=seed) for seed in range(3))

    def step(images, real):
        few = (x[:images], lowpass.down(reference[:images]), noise[:images])
        return guided_step(model, schedule, lowpass, 10, *few, 6.0, "batch", 2, real)

    padded, alone = step(4, 3), step(3, None)
    torch.testing.assert_close(padded[:3], alone, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(padded[2], step(4, None)[2])
    assert padded.isfinite().all()
