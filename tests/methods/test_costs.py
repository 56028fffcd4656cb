"""What each method says it costs, against what passes the networks, counted by hooks."""

import pytest
import torch

from sda_fast import Projector
from sda_fast.methods import METHODS, create, method_class
from sda_fast.methods.vp_sde import SDEPurifier
from sda_fast.models import load_adm, load_classifier, load_dit
from sda_fast.projector import Purifier

IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

# docs/methods.md: classifier forward, backward; diffusion model forward, backward. The defaults are the published ones.
PUBLISHED = {
    "source": (1, 0, 0, 0),
    "tent": (1, 1, 0, 0),
    "memo": (65, 64, 0, 0),
    "diffusion_tta": (6, 5, 900, 900),
    "diffpure": (1, 0, 150, 0),
    "gda": (66, 64, 9, 4),
    "dda": (2, 0, 50, 50),
    "sda": (2, 0, 50, 50),
}


@pytest.fixture
def models(tiny):
    return {"classifier": load_classifier(tiny.resnet), "adm": load_adm(tiny.adm), "dit": load_dit(tiny.dit)}


def build(name, models, **options):
    kind = method_class(name)
    options.update({need: models[need] for need in kind.needs})
    if kind.finetuned:
        options["finetuned"] = models["classifier"]
    return create(name, models["classifier"], **options)


def projector(name, models):
    return {"dda": Projector, "diffpure": SDEPurifier}[method_class(name).projection](models["adm"])


def watch(*modules):
    """[images forward, images backward] through the modules, counted as they run."""
    seen = [0, 0]

    def forward(module, inputs, output):
        seen[0] += len(output)
        if output.requires_grad:
            output.register_hook(lambda gradient: seen.__setitem__(1, seen[1] + len(gradient)))

    for module in modules:
        module.register_forward_hook(forward)
    return seen


@pytest.mark.parametrize("name", METHODS)
def test_the_published_settings_cost_what_is_documented(name, models):
    if name == "diffpure":
        pytest.importorskip("torchsde", reason='needs pip install "sda-fast[diffpure]"')
    options = {"projector": projector(name, models)} if method_class(name).projection else {}
    assert build(name, models, **options).cost() == PUBLISHED[name]


SMALL = {
    "tent": {"steps": 2},
    "memo": {"views": 5, "steps": 2},
    "diffusion_tta": {"updates": 2, "pairs": 7, "batch_size": 3},
    "gda": {"views": 3, "start": 2},
}


@pytest.mark.parametrize(("name", "how"), [*((name, {}) for name in METHODS), ("sda", {"jacobian_free": True})])
def test_costs_are_those_counted(name, how, models):
    options, purifiers = dict(SMALL.get(name, {})), {"dda": Projector, "diffpure": Purifier}
    if kind := method_class(name).projection:
        options["projector"] = purifiers[kind](models["adm"], start=3, **how)
    method = build(name, models, **options)
    classifiers = {id(m): m for m in (models["classifier"], getattr(method, "adapted", models["classifier"]))}
    # The first layers see every pass, also those through half of a network.
    diffusion = [models["adm"].input_blocks[0], getattr(method, "adapted_dit", models["dit"]).x_embedder]
    classified, diffused = watch(*classifiers.values()), watch(*diffusion)
    method(IMAGES)
    assert [n / len(IMAGES) for n in (*classified, *diffused)] == list(method.cost())
