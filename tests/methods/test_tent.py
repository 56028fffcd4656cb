"""Tent against the original's numbers, and what it learns from: batch, stream and reset."""

from functools import partial

import pytest
import torch
from torch import nn

from sda_fast.errors import SdaError
from sda_fast.methods import create

SGD = partial(torch.optim.SGD, lr=0.02, momentum=0.9)


@pytest.fixture
def reference(load_reference, load_weights, reference_network):
    tensors, _ = load_reference("tent")
    return reference_network(load_weights(tensors)), tensors


def test_outputs_and_adapted_parameters_match_the_original(reference, relative):
    network, tensors = reference
    tta = create("tent", network, optimizer=SGD)
    for batch, logits in zip(tensors["x"], tensors["outputs"], strict=True):
        assert relative(tta.adapt(batch, []), logits) <= 1e-5
    state = tta.adapted.state_dict()
    for name in ("1.weight", "1.bias", "4.weight", "4.bias"):
        assert relative(state[name], tensors[f"adapted/{name}"]) <= 1e-5
        assert not torch.equal(state[name], tensors[f"weights/{name}"])


def test_predictions_are_those_from_before_the_step(reference, relative):
    network, tensors = reference
    tta = create("tent", network, optimizer=SGD)
    for batch, logits in zip(tensors["x"], tensors["outputs"], strict=True):
        assert relative(tta(batch), logits.softmax(1)) <= 1e-5


def test_the_source_model_and_all_other_parameters_stay(reference):
    network, tensors = reference
    before = {name: value.clone() for name, value in network.state_dict().items()}
    tta = create("tent", network, optimizer=SGD)
    tta(tensors["x"][0])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    adapted = dict(tta.adapted.named_parameters())
    changed = {name for name, value in network.named_parameters() if not torch.equal(value, adapted[name])}
    assert changed == {"1.weight", "1.bias", "4.weight", "4.bias"}


def test_reset_forgets_weights_and_momentum(reference):
    network, tensors = reference
    tta = create("tent", network, optimizer=SGD)
    first = [tta(batch) for batch in tensors["x"]]
    continual = [tta(batch) for batch in tensors["x"]]
    tta.reset()
    again = [tta(batch) for batch in tensors["x"]]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, continual, strict=True))


def test_episodic_takes_every_batch_by_itself(reference):
    network, tensors = reference
    tta = create("tent", network, optimizer=SGD, episodic=True)
    assert torch.equal(torch.stack([tta(tensors["x"][i]) for i in (2, 0)])[1], tta(tensors["x"][0]))
    steps = create("tent", network, optimizer=SGD, episodic=True, steps=2)
    continual = create("tent", network, optimizer=SGD)
    continual(tensors["x"][0])
    assert torch.equal(steps(tensors["x"][0]), continual(tensors["x"][0]))


def test_the_result_depends_on_the_batch(reference):
    network, tensors = reference
    whole, halves = (create("tent", network, optimizer=SGD) for _ in range(2))
    batch = tensors["x"][0]
    assert not torch.allclose(whole(batch)[:8], halves(batch[:8]), atol=1e-3)
    assert not whole.per_image


def test_layer_and_group_norms_are_adapted():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.LayerNorm(288), nn.Linear(288, 4))
    tta = create("tent", network, optimizer=SGD)
    tta(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    adapted = dict(tta.adapted.named_parameters())
    changed = {name for name, value in network.named_parameters() if not torch.equal(value, adapted[name])}
    assert changed == {"1.weight", "1.bias", "3.weight", "3.bias"}


@pytest.mark.parametrize("side", [4, 1])
def test_one_image_alone(side):
    """Also where a map is a single pixel, which PyTorch's batch statistics refuse: normalised, it is zero."""
    network = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    nn.init.normal_(network[0].bias)
    tta = create("tent", network, optimizer=SGD)
    x = torch.rand(1, 3, side, side)
    expected = network[3](network[0].bias[None]).softmax(1)  # the mean of what is normalised is zero
    torch.testing.assert_close(tta(x), expected.detach())
    assert not torch.equal(tta.adapted[0].bias, network[0].bias)


def test_wrong_use():
    with pytest.raises(SdaError, match="the classifier has no parameters that Tent adapts"):
        create("tent", nn.Linear(3, 2))
    with pytest.raises(SdaError, match="steps=0 is out of range"):
        create("tent", nn.LayerNorm(3), steps=0)
