"""Each method's scores by hand, on classifiers and projectors that are small enough to follow."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from sda_fast.errors import SdaError
from sda_fast.methods import METHODS, Method, create, method_class
from sda_fast.methods.ensembles import MODES, combine_scores

# What looks at the image and its projection with the weights it is given; the others have files of their own.
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


@pytest.mark.parametrize("name", PROJECTION)
def test_scores_by_hand(name):
    result = build(name)(IMAGES, PROJECTED)
    torch.testing.assert_close(result, EXPECTED[name])
    assert not result.requires_grad


@pytest.mark.parametrize("name", PROJECTION)
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


def named(attribute):
    return {name: value for name in METHODS if (value := getattr(method_class(name), attribute))}


def test_methods_say_what_they_may_look_at():
    assert named("projection") == {name: kind for name, kind in PROJECTION.items() if kind}
    assert list(named("finetuned")) == ["sda"]
    assert named("needs") == {"diffusion_tta": ("dit",), "gda": ("adm",)}
    assert set(named("on_request")) == set(METHODS) - set(PROJECTION)
    assert set(METHODS) - set(named("per_image")) == {"tent"}
    titles = ["Source", "Tent", "MEMO", "Diffusion-TTA", "DiffPure", "GDA", "DDA", "SDA"]
    assert list(named("title").values()) == titles


def test_an_unknown_method_is_refused():
    with pytest.raises(SdaError, match="method 'magic' is not known; choose from source, tent, memo, diffusion_tta"):
        create("magic", Means(1.0))


def test_options_a_method_does_not_take_are_refused():
    with pytest.raises(SdaError, match="method tent: got an unexpected keyword argument 'views'; it takes model, proj"):
        create("tent", Means(1.0), views=64)
    with pytest.raises(SdaError, match="method diffusion_tta: missing a required argument: 'dit'; it takes model, dit"):
        create("diffusion_tta", Means(1.0))


def test_importing_the_methods_imports_none():
    code = "import sys, sda_fast.methods; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "sda_fast.methods.base" in loaded
    own = {name for name in loaded if name.startswith("sda_fast")}
    assert own == {"sda_fast", "sda_fast.errors", "sda_fast.methods", "sda_fast.methods.base", "sda_fast.values"}
    assert loaded.isdisjoint({"timm", "diffusers", "torchsde", "torchvision", "PIL", "scipy"})


def test_naming_a_class_adds_a_method(monkeypatch):
    class Guess(Method):
        title = "Guess"

        def scores(self, images, projected):
            return torch.full((len(images), 3), 1 / 3)

    monkeypatch.setitem(sys.modules, "elsewhere", SimpleNamespace(Guess=Guess))
    monkeypatch.setitem(METHODS, "guess", "elsewhere:Guess")
    assert method_class("guess").title == "Guess"
    assert torch.equal(create("guess", Means(1.0))(IMAGES), torch.full((4, 3), 1 / 3))
