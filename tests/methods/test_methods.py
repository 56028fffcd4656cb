"""Each method's scores by hand, on classifiers and projectors that are small enough to follow."""

import sys
from types import SimpleNamespace

import pytest
import torch

from sda_fast.errors import SdaError
from sda_fast.methods import METHODS, Method, create, method_class
from sda_fast.methods.ensembles import MODES, combine_scores

PROJECTION = {"source": None, "diffpure": "diffpure", "dda": "dda", "sda": "dda"}
IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
PROJECTED = IMAGES.flip(-1) * 0.5


class Means(torch.nn.Module):
    """Logits: `gain` times the mean of every colour. Half of them vanish in training."""

    def __init__(self, gain):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain))
        self.dropout = torch.nn.Dropout()

    def forward(self, x):
        return self.dropout(self.gain * x.mean((2, 3)))


class Halving:
    """A projector that remembers what it was asked for."""

    def __init__(self):
        self.calls = []

    def __call__(self, images, noise=None, seeds=None):
        self.calls.append((images, seeds))
        return images.flip(-1) * 0.5


def scores(gain, images):
    return (gain * images.mean((2, 3))).softmax(dim=1)


EXPECTED = {
    "source": scores(9.0, IMAGES),
    "diffpure": scores(9.0, PROJECTED),
    "dda": scores(9.0, IMAGES) + scores(9.0, PROJECTED),
    "sda": scores(9.0, IMAGES) + scores(-20.0, PROJECTED),
}


def build(name, **options):
    if method_class(name).finetuned:
        options["finetuned"] = Means(-20.0)
    return create(name, Means(9.0), **options)


@pytest.mark.parametrize("name", METHODS)
def test_scores_by_hand(name):
    result = build(name)(IMAGES, PROJECTED)
    torch.testing.assert_close(result, EXPECTED[name])
    assert not result.requires_grad


@pytest.mark.parametrize("name", METHODS)
def test_projections_are_made_where_they_are_needed_and_missing(name):
    projector = Halving()
    method = build(name, projector=projector)
    torch.testing.assert_close(method(IMAGES, seeds=[3, 1, 4, 1]), EXPECTED[name])
    assert [seeds for _, seeds in projector.calls] == ([[3, 1, 4, 1]] if PROJECTION[name] else [])
    assert all(images is IMAGES for images, _ in projector.calls)
    projector.calls.clear()
    method(IMAGES, PROJECTED)
    assert not projector.calls


@pytest.mark.parametrize("name", [name for name, projection in PROJECTION.items() if projection])
def test_without_projections_or_a_projector_there_are_no_scores(name):
    method = build(name)
    with pytest.raises(SdaError, match=f"{method.title} needs projected images or a projector: pass projector="):
        method(IMAGES)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["dda", "sda"])
def test_ensemble_modes(name, mode):
    second = scores(9.0 if name == "dda" else -20.0, PROJECTED)
    expected = combine_scores(EXPECTED["source"], second, mode)
    torch.testing.assert_close(build(name, mode=mode)(IMAGES, PROJECTED), expected)


def test_an_unknown_mode_is_refused():
    with pytest.raises(SdaError, match="'median' is not known"):
        build("sda", mode="median")(IMAGES, PROJECTED)


def test_methods_say_what_they_may_look_at():
    assert {name: method_class(name).projection for name in METHODS} == PROJECTION
    assert [name for name in METHODS if method_class(name).finetuned] == ["sda"]
    titles = [method_class(name).title for name in METHODS]
    assert titles == ["Source", "DiffPure", "DDA", "SDA"]


def test_an_unknown_method_is_refused():
    with pytest.raises(SdaError, match="method 'magic' is not known; choose from source, diffpure, dda, sda"):
        create("magic", Means(1.0))


def test_naming_a_class_adds_a_method(monkeypatch):
    class Guess(Method):
        title = "Guess"

        def scores(self, images, projected):
            return torch.full((len(images), 3), 1 / 3)

    monkeypatch.setitem(sys.modules, "elsewhere", SimpleNamespace(Guess=Guess))
    monkeypatch.setitem(METHODS, "guess", "elsewhere:Guess")
    assert method_class("guess").title == "Guess"
    assert torch.equal(create("guess", Means(1.0))(IMAGES), torch.full((4, 3), 1 / 3))
