"""The reference samplers: guided projection against SDA's trajectories, the others by their properties."""

import pytest
import torch

from sda_fast.reference import (
    UNet,
    ancestral,
    diffpure,
    guided_projection,
    guided_step,
    linear_schedule,
    p_sample,
    q_sample,
)

DDA = ["dda_batch2", "dda_batch1"]


@pytest.fixture(scope="module")
def adm(load_reference, load_weights):
    tensors, meta = load_reference("adm_tiny")
    model = UNet(**meta["config"]).eval()
    model.load_state_dict(load_weights(tensors))
    return model


def indices(i, x):
    return torch.full((len(x),), i)


def knows(target, respacing, variance="learned_range"):
    """A model that returns the eps leading exactly to `target`, and v = 0."""
    schedule = linear_schedule(respacing)
    abar = dict(zip(schedule.timestep_map.tolist(), schedule.alphas_cumprod.tolist(), strict=True))

    def model(x, timesteps):
        a = torch.tensor([abar[int(t)] for t in timesteps])[:, None, None, None]
        eps = (x - a.sqrt() * target) / (1 - a).sqrt()
        return torch.cat([eps, torch.zeros_like(eps)], dim=1) if variance == "learned_range" else eps

    return model


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", DDA)
def test_whole_projection_matches_the_original(load_reference, adm, name):
    tensors, meta = load_reference(name)
    steps = list(
        guided_projection(
            adm,
            tensors["reference"],
            tensors["noise"].float(),
            respacing=meta["respacing"],
            start=meta["start_step"],
            factor=meta["factor"],
            scale=meta["scale"],
        )
    )
    assert len(steps) == len(tensors["samples"]) == 50
    for step, expected in zip(steps, tensors["samples"], strict=True):
        assert (step.sample - expected).abs().mean() < 1e-5
    torch.testing.assert_close(steps[-1].pred_xstart, tensors["pred_xstart_last"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", DDA)
def test_every_single_step_matches_the_original(load_reference, adm, name):
    tensors, meta = load_reference(name)
    schedule, reference, noise = (
        linear_schedule(meta["respacing"]),
        tensors["reference"],
        tensors["noise"].float(),
    )
    start = meta["start_step"]
    x = q_sample(schedule, reference, indices(start, reference), noise[0])
    for k, expected in enumerate(tensors["samples"], 1):
        i = indices(start - k, reference)
        step = guided_step(schedule, adm, x, i, noise[k], reference, meta["factor"], meta["scale"])
        assert (step.sample - expected).abs().mean() < 1e-6
        assert (step.sample - expected).abs().max() < 1e-5
        x = expected


def test_norm_over_the_batch_weakens_guidance(load_reference, adm):
    # Two equal images share one norm, sqrt(2) times that of one, so each is guided 1/sqrt(2) as much.
    tensors, _ = load_reference("dda_batch1")
    schedule, reference, x = linear_schedule("100"), tensors["reference"], tensors["samples"][10]
    still = torch.zeros_like(x)

    def guidance(copies):
        images = [t.expand(copies, -1, -1, -1) for t in (x, still, reference)]
        i = indices(20, images[0])
        steps = [guided_step(schedule, adm, images[0], i, images[1], images[2], 4, w) for w in (0.0, 1.0)]
        return (steps[0].sample - steps[1].sample)[:1]

    torch.testing.assert_close(guidance(2) * 2**0.5, guidance(1), rtol=1e-3, atol=1e-6)


def test_no_guidance_where_the_prediction_is_clamped():
    # x_0 = 3 in the left half is clamped; this model is linear in x pixel by pixel, so nothing leaks across.
    target = torch.zeros(1, 3, 8, 8)
    target[..., :4] = 3.0
    schedule = linear_schedule("100")
    x = q_sample(schedule, target, indices(20, target), torch.zeros_like(target))

    def model(x, timesteps):
        return torch.zeros(len(x), 6, 8, 8)

    arguments = (indices(20, x), torch.zeros_like(x), torch.full_like(x, 0.5), 2)
    free, guided = (guided_step(schedule, model, x, *arguments, w).sample for w in (0.0, 6.0))
    assert torch.equal(free[..., :4], guided[..., :4])
    assert ((free - guided)[..., 4:] != 0).all()


def test_zero_scale_is_ancestral_sampling(load_reference, adm):
    tensors, _ = load_reference("dda_batch2")
    images, noise = tensors["reference"], tensors["noise"].float()[:5]
    guided = list(guided_projection(adm, images, noise, respacing="50", start=4, scale=0.0))
    x = q_sample(linear_schedule("50"), images, indices(4, images), noise[0])
    unguided = list(ancestral(adm, x, noise[1:], respacing="50", start=4, clip=True))
    for a, b in zip(guided, unguided, strict=True):
        torch.testing.assert_close(a.sample, b.sample, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variance", ["learned_range", "fixed_small", "fixed_large"])
def test_ancestral_sampling_arrives_where_the_model_points(variance):
    target = 3 * draw(2, 4, 8, 8)  # beyond [-1, 1]: no clipping
    model = knows(target, "10", variance)
    noise = draw(10, 2, 4, 8, 8, seed=1)
    *_, last = ancestral(model, draw(2, 4, 8, 8, seed=2), noise, "10", variance=variance)
    torch.testing.assert_close(last.sample, target, rtol=1e-4, atol=1e-4)


def test_variance_of_one_step():
    # At x_0 = x_t = 0 the sample is sigma_t times the noise.
    s, i, x = linear_schedule("100"), torch.tensor([40]), torch.zeros(1, 3, 4, 4)
    one = torch.ones_like(x)
    for v, expected in [(-1.0, s.posterior_variance[40]), (1.0, s.betas[40])]:
        out = torch.cat([torch.zeros_like(x), torch.full_like(x, v)], dim=1)
        sample = p_sample(s, lambda x, t, out=out: out, x, i, one).sample
        torch.testing.assert_close(sample, one * expected**0.5)
    zeros = torch.zeros_like(x)
    for variance, expected in [("fixed_small", s.posterior_variance[40]), ("fixed_large", s.betas[40])]:
        sample = p_sample(s, lambda x, t: zeros, x, i, one, variance=variance).sample
        torch.testing.assert_close(sample, one * expected**0.5)


def test_diffpure_takes_as_many_steps_as_it_adds_noise():
    target = draw(2, 3, 8, 8).clamp(-1, 1)
    told = []
    knowing = knows(target, "1000")

    def model(x, timesteps):
        told.append(timesteps.tolist())
        return knowing(x, timesteps)

    noise = draw(6, 2, 3, 8, 8, seed=1)
    steps = list(diffpure(model, draw(2, 3, 8, 8, seed=2), noise, start=5))
    assert told == [[i, i] for i in (4, 3, 2, 1, 0)]
    torch.testing.assert_close(steps[-1].sample, target, rtol=1e-4, atol=1e-4)
    assert all(step.pred_xstart.abs().max() <= 1 for step in steps)


def test_projection_is_noised_one_index_above_its_first_step(load_reference, adm):
    told = []

    def model(x, timesteps):
        told.append(timesteps.tolist())
        return adm(x, timesteps)

    tensors, _ = load_reference("dda_batch1")
    next(guided_projection(model, tensors["reference"], tensors["noise"].float()))
    assert linear_schedule("100").timestep_map[50] == 505
    assert told == [[494]]


def test_without_noise_it_is_drawn_from_the_global_generator(load_reference, adm):
    images = load_reference("dda_batch1")[0]["reference"]
    torch.manual_seed(7)
    first = [step.sample for step in guided_projection(adm, images, respacing="50", start=2)]
    torch.manual_seed(7)
    noise = torch.stack([torch.randn_like(images) for _ in range(3)])
    second = [step.sample for step in guided_projection(adm, images, noise, respacing="50", start=2)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("start", [0, 100])
def test_start_out_of_range_is_refused(start):
    x = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match="start"):
        next(guided_projection(lambda x, t: x, x, start=start))
    with pytest.raises(ValueError, match="start"):
        next(diffpure(lambda x, t: x, x, respacing="99", start=start))


def test_noise_of_another_shape_is_refused():
    x = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match="noise"):
        next(guided_projection(lambda x, t: x, x, torch.zeros(50, 1, 3, 32, 32)))
