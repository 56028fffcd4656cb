"""What all methods that change weights promise, on two that need no diffusion model."""

from functools import partial

import pytest
import torch
from torch import nn

from sda_fast.errors import SdaError
from sda_fast.methods import create
from sda_fast.methods.adaptation import generator

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
METHODS = {
    "tent": {"optimizer": partial(torch.optim.SGD, lr=1.0)},
    "memo": {"optimizer": partial(torch.optim.SGD, lr=1.0), "views": 4},
}


@pytest.fixture(params=METHODS)
def build(request):
    """build(**options): one of the methods around a small random network of its own."""

    def make(**options):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(288, 4)
        )
        return create(request.param, network.train(), **METHODS[request.param], **options)

    return make


def test_probabilities_are_returned_whatever_the_callers_modes(build):
    scores = build()(IMAGES)
    torch.testing.assert_close(scores.sum(1), torch.ones(4))
    assert not scores.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        tta = build()
        with mode():
            assert torch.equal(tta(IMAGES.clone()), scores)
            tta.reset()
            assert torch.equal(tta(IMAGES), scores)


def test_stacked_on_projections(build):
    calls = []

    def projector(images, seeds):
        calls.append(seeds)
        return images.flip(-1)

    expected = build()(IMAGES.flip(-1), seeds=[5, 6, 7, 8])
    assert torch.equal(build(projector=projector)(IMAGES, seeds=[5, 6, 7, 8]), expected)
    assert calls == [[5, 6, 7, 8]]
    assert torch.equal(build()(IMAGES, IMAGES.flip(-1), seeds=[5, 6, 7, 8]), expected)
    assert not torch.equal(build()(IMAGES, seeds=[5, 6, 7, 8]), expected)


def test_no_images(build):
    assert build()(IMAGES[:0]).shape == (0, 4)


def test_wrong_use(build):
    tta = build()
    poisoned = IMAGES.clone()
    poisoned[1, 0, 0, 0] = float("nan")
    with pytest.raises(SdaError, match="images hold NaN or infinity"):
        tta(poisoned)
    for seeds in ([1, 2], [1.0, 2.0, 3.0, 4.0], torch.rand(4)):
        with pytest.raises(SdaError, match="seeds must be one integer for each of the 4 images"):
            tta(IMAGES, seeds=seeds)
    assert tta(IMAGES).isfinite().all()


def test_random_numbers_are_a_function_of_seed_and_identity():
    first = generator(3, 2**63 - 1).random(4)
    assert (first == generator(3, 2**63 - 1).random(4)).all()
    for seed, identity in ((4, 2**63 - 1), (3, -(2**63)), (2**64 - 1, 0)):
        assert (first != generator(seed, identity).random(4)).all()
