"""Sampling from a DiT: the original's samples, guidance, and independence of the batch."""

import pytest
import torch

from sda_fast.errors import SdaError
from sda_fast.models import DiT, load_dit
from sda_fast.ops import philox_normal
from sda_fast.reference import ancestral
from sda_fast.sampler import Sampler

LABELS = [2, 0, 1, 1, 0]
SEEDS = torch.tensor([11, -3, 2**62, 5, 7])


@pytest.fixture(scope="module")
def original(load_reference, load_weights):
    """(model, tensors, configuration) of the two-block DiT."""
    tensors, meta = load_reference("dit_tiny")
    dit = DiT(**meta["config"]).eval()
    dit.load_state_dict(load_weights(tensors))
    return dit, tensors, meta


@pytest.fixture(scope="module")
def dit(tiny):
    return load_dit(tiny.dit)


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_ten_steps_match_the_original(original, batch_size):
    dit, tensors, meta = original
    sampler = Sampler(dit, respacing=meta["respacing"], batch_size=batch_size)
    result = sampler(tensors["y"], noise=torch.cat([tensors["x"][None], tensors["noise"]]))
    expected = tensors["samples"][-1]
    error = float((result - expected).norm() / expected.norm())
    assert error <= 1e-4, error


def test_guidance_is_that_of_the_doubled_batch(original):
    dit, tensors, meta = original
    start, scale = torch.cat([tensors["x"], tensors["x"]]), meta["cfg_scale"]
    labels = torch.cat([tensors["y"], torch.full_like(tensors["y"], meta["config"]["num_classes"])])
    *_, doubled = ancestral(
        lambda x, t: dit.forward_with_cfg(x, t, labels, scale),
        start,
        tensors["noise"].repeat(1, 2, 1, 1, 1),
        meta["respacing"],
    )
    noise = torch.cat([tensors["x"][None], tensors["noise"]])
    guided = Sampler(dit, meta["respacing"], scale)(tensors["y"], noise=noise)
    torch.testing.assert_close(guided, doubled.sample[:2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(guided, Sampler(dit, meta["respacing"])(tensors["y"], noise=noise), atol=1e-2)


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
@pytest.mark.parametrize("batch_size", [2, 7])
def test_a_sample_does_not_depend_on_its_batch(dit, batch_size, cfg_scale):
    sampler = Sampler(dit, "4", cfg_scale, clip=True, batch_size=batch_size)
    labels = torch.tensor(LABELS)
    together = sampler(labels, seeds=SEEDS)
    for order in ([4, 1, 3, 0, 2], [2], [3, 1]):
        assert torch.equal(sampler(labels[order], seeds=SEEDS[order]), together[order])


def test_seeds_name_the_noise(dit):
    sampler, shape = Sampler(dit, "4", seed=9), (5, 3, 16, 16)
    noise = torch.stack([philox_normal(shape, seed=9, identities=SEEDS, step=k) for k in range(5)])
    assert torch.equal(sampler(LABELS, seeds=SEEDS), sampler(LABELS, noise=noise))
    assert torch.equal(sampler(LABELS), sampler(LABELS, seeds=range(5)))
    assert not torch.equal(sampler(LABELS), Sampler(dit, "4", seed=10)(LABELS))


def test_clipping_keeps_pixels_in_range(dit):
    clipped, free = (Sampler(dit, "4", clip=clip)(LABELS) for clip in (True, False))
    assert clipped.abs().max() <= 1  # the last step returns the clamped prediction
    assert free.abs().max() > 1


def test_no_labels_give_no_images(dit):
    for labels in ([], torch.empty(0, dtype=torch.int64)):
        assert Sampler(dit, "4", batch_size=3)(labels).shape == (0, 3, 16, 16)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"cfg_scale": 0.5}, "cfg_scale=0.5 is out of range"),
        ({"batch_size": 0}, "batch_size=0 is out of range"),
        ({"respacing": "2000"}, "respacing '2000'"),
    ],
)
def test_settings_out_of_range(dit, settings, problem):
    with pytest.raises(SdaError, match=problem):
        Sampler(dit, **settings)


def test_guidance_needs_a_null_class(tiny):
    dit = load_dit(tiny.save("dit", "no_null", class_dropout_prob=0.0))
    assert Sampler(dit, "2")(LABELS).shape == (5, 3, 16, 16)
    with pytest.raises(SdaError, match="no null class"):
        Sampler(dit, "2", cfg_scale=1.5)


@pytest.mark.parametrize("labels", [[3], [-1], [[0, 1]]])
def test_labels_the_model_does_not_have(dit, labels):
    with pytest.raises(SdaError, match=r"labels must be \[N\] integers from 0 to 2"):
        Sampler(dit, "4")(labels)


def test_noise_and_seeds_that_do_not_fit(dit):
    sampler = Sampler(dit, "4")
    with pytest.raises(SdaError, match=r"noise has shape \[4, 1, 3, 16, 16\]; it must be \[5, 1, 3, 16, 16\]"):
        sampler([0], noise=torch.zeros(4, 1, 3, 16, 16))
    with pytest.raises(SdaError, match="one integer for each of the 1 images"):
        sampler([0], seeds=[1, 2])
    with pytest.raises(SdaError, match="either noise or seeds"):
        sampler([0], noise=torch.zeros(5, 1, 3, 16, 16), seeds=[0])
