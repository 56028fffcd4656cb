"""What all methods that change weights promise, on two that need no diffusion model."""

from functools import partial

import pytest
import torch
from torch import nn

from sda_fast.errors import SdaError
from sda_fast.methods import create, create_from
from sda_fast.methods.adaptation import generator
from sda_fast.models import load_classifier

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


def test_the_published_rate_in_another_size(tiny):
    model = load_classifier(tiny.resnet)
    for name in ("tent", "memo"):
        usual = create(name, model).optimizer
        assert type(usual) is torch.optim.SGD
        other = create(name, model, lr=3e-3).optimizer
        (one,), (two,) = usual.param_groups, other.param_groups
        assert (one["lr"], two["lr"]) == (2.5e-4, 3e-3)
        assert {**one, "lr": 0, "params": 0} == {**two, "lr": 0, "params": 0}
        with pytest.raises(SdaError, match="lr=-1 is out of range: give more than 0"):
            create(name, model, lr=-1)
        with pytest.raises(SdaError, match="lr is that of the published optimizer: give your own its rate, or leave"):
            create(name, model, lr=1e-3, optimizer=partial(torch.optim.SGD, lr=1.0))
    adamw = create("memo", load_classifier(tiny.convnext), lr=3e-3).optimizer
    assert (type(adamw), adamw.defaults["lr"], adamw.defaults["weight_decay"]) == (torch.optim.AdamW, 3e-3, 0.01)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"views": 8.5}, "method memo: views = 8.5 is of another type; give a whole number"),
        ({"views": "8"}, "method memo: views = '8' is of another type; give a whole number"),
        ({"fill": [128, 128]}, r"method memo: fill = \[128, 128\] is of another type; give a list of 3 whole numbers"),
        ({"prior": "none"}, "method memo: prior = 'none' is of another type; give a number"),
        ({"leak_optimizer_state": 1}, "method memo: leak_optimizer_state = 1 is of another type; give true or false"),
        ({"fill": [256, 0, 0]}, r"fill=\(256, 0, 0\) is out of range: give three numbers from 0 to 255"),
        ({"optimizer": "sgd"}, "method memo: optimizer cannot be given here, only from Python: leave it out"),
        ({"projector": "dda"}, "method memo: projector cannot be given here, only from Python: leave it out"),
        ({"view": 8}, "method memo: got an unexpected keyword argument 'view'; it takes model, projector, views"),
    ],
)
def test_options_from_a_file_have_their_types(tiny, options, said):
    model = load_classifier(tiny.resnet)
    with pytest.raises(SdaError, match=said):
        create_from("memo", model, {}, options)
    plain = {"fill": [128, 128, 128], "prior": None, "lr": 1, "views": 2}
    tta = create_from("memo", model, {"seed": 7, "dit": model}, plain)
    assert (tta.fill, tta.seed, tta.views) == ((128, 128, 128), 7, 2)
    assert tta(torch.zeros(1, 3, 16, 16)).shape == (1, 3)


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
