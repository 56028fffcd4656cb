"""Batches in parts: what each holds, what their gradients add up to, whose statistics BatchNorm keeps."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sda_fast.data import to_unit
from sda_fast.errors import SdaError
from sda_fast.models import load_classifier
from sda_fast.stages import training
from sda_fast.stages.epochs import batches, divide, epoch_parts
from sda_fast.stages.recipes import RECIPES, Recipe

RECIPE = Recipe("sgd", 1e-2, 0.0, 8, 1, "step", label_smoothing=0.1, micro_batch=4)


def test_a_last_image_joins_the_batch_before():
    assert batches(9, 4) == [slice(0, 4), slice(4, 9)]
    assert batches(8, 4) == [slice(0, 4), slice(4, 8)]
    assert batches(10, 4) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert batches(3, 4) == [slice(0, 3)]


@pytest.mark.parametrize(("images", "parts", "sizes"), [(848, 8, [106] * 8), (7, 3, [3, 2, 2]), (5, 8, [3, 2])])
def test_parts_are_even_and_hold_two_images_at_least(images, parts, sizes):
    divided = divide(np.arange(images), parts)
    assert [len(part) for part in divided] == sizes
    assert np.concatenate(divided).tolist() == list(range(images))


def test_fifty_thousand_images_as_on_eight_gpus():
    """49 and 98 steps per epoch; the last batches are 848 and 336, so 106 and 42 images per GPU."""
    for name, steps, whole, last in (("code-transformer", 49, 128, 106), ("paper-resnet", 98, 64, 42)):
        parts = epoch_parts(50_000, RECIPES[name], seed=1, epoch=3)
        assert len(parts) == steps
        assert {len(part) for batch in parts[:-1] for part in batch} == {whole}
        assert [len(part) for part in parts[-1]] == [last] * 8
        seen = np.concatenate([part for batch in parts for part in batch])
        assert sorted(seen.tolist()) == list(range(50_000))
        assert not (seen == np.sort(seen)).all()


def loaded(parts, images, labels):
    return iter([(images[part], labels[part]) for part in parts])


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (7, 16, 16, 3), dtype=torch.uint8, generator=generator)
    return images, torch.tensor([0, 1, 2, 0, 1, 2, 0]), divide(np.arange(7), 3)


def test_parts_add_up_to_the_batch(tiny, data):
    """Unequal parts, without batch statistics: the gradient is that of the mean over all seven images."""
    images, labels, parts = data
    model = load_classifier(tiny.convnext).requires_grad_(True)
    loss = nn.functional.cross_entropy(model(to_unit(images)), labels, label_smoothing=0.1)
    loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    total = training._gradient(model, parts, loaded(parts, images, labels), RECIPE, [0, 0, 0], None)
    assert total.item() == pytest.approx(7 * loss.item(), rel=1e-6)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


def test_running_statistics_are_the_first_parts(tiny, data):
    """As after the original's first process; every part is normalised by its own statistics."""
    images, labels, parts = data
    model, alone = (load_classifier(tiny.resnet).train() for _ in range(2))
    training._gradient(model.requires_grad_(True), parts, loaded(parts, images, labels), RECIPE, [0, 0, 0], None)
    alone(to_unit(images[parts[0]]))
    norms = 0
    for (name, buffer), expected in zip(model.named_buffers(), alone.buffers(), strict=True):
        assert torch.equal(buffer, expected), name
        norms += name.endswith("num_batches_tracked") and buffer.item() == 1
    assert norms > 5
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    expected = [torch.zeros_like(p) for p in alone.parameters()]
    for part in parts:
        alone.zero_grad()
        nn.functional.cross_entropy(
            alone.requires_grad_(True)(to_unit(images[part])), labels[part], label_smoothing=0.1
        ).backward()
        expected = [e + p.grad * len(part) / 7 for e, p in zip(expected, alone.parameters(), strict=True)]
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_memory_that_does_not_hold_the_sum_over_processes(tiny, data, monkeypatch):
    def too_much(tensor):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.distributed, "all_reduce", too_much)
    images, labels, parts = data
    model = load_classifier(tiny.convnext).requires_grad_(True)
    first_of_one = SimpleNamespace(rank=0, size=1)
    with pytest.raises(SdaError, match="the device's memory does not hold the gradients and the optimizer's state"):
        training._gradient(model, parts, loaded(parts, images, labels), RECIPE, [0, 0, 0], first_of_one)
