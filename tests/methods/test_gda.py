"""GDA, of which there are no numbers to compare with: its steps by hand, its terms, and who depends on whom."""

import math

import pytest
import torch
from torch.nn import functional as F

from sda_fast.errors import SdaError
from sda_fast.methods import create
from sda_fast.methods import gda as gda_module
from sda_fast.methods.adaptation import generator
from sda_fast.methods.gda import WEIGHTS, encoder_features
from sda_fast.models import load_adm, load_classifier
from sda_fast.ops import philox_normal

IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
NOTHING = dict.fromkeys(WEIGHTS, 0.0)


@pytest.fixture
def models(tiny):
    return load_classifier(tiny.convnext), load_adm(tiny.adm)


def gda(models, **options):
    return create("gda", models[0], adm=models[1], **{"views": 3, **options})


def test_guided_steps_by_hand(models):
    """The published update on another path: the pixel term alone, all from the schedule's own tables.

    What is shown is the last step's x_0, clamped, which its own guidance does not reach.
    """
    tta = gda(models, start=3, weights={**NOTHING, "pixel": 2000.0})
    s, adm, reference = tta.schedule, tta.adm, IMAGES[:1]

    def noise(k):
        return philox_normal(reference.shape, seed=0, identities=[4], step=k)

    x = s.alphas_cumprod[2].sqrt().float() * reference + (1 - s.alphas_cumprod[2]).sqrt().float() * noise(0)
    for k, i in enumerate((2, 1, 0), 1):
        abar = s.alphas_cumprod[i].item()
        x.requires_grad_()
        eps, v = adm(x, s.timestep_map[i][None]).chunk(2, 1)
        x0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        if i == 0:
            break
        f = math.sqrt(1 - abar)
        (g,) = torch.autograd.grad(-2000.0 * F.mse_loss(f * x0 + (1 - f) * x, reference), x)
        variance = torch.exp((v + 1) / 2 * s.betas[i].log() + (1 - v) / 2 * s.posterior_log_variance_clipped[i])
        mean = s.posterior_mean_coef1[i] * x0 + s.posterior_mean_coef2[i] * x
        x = (mean + variance * g + variance.sqrt() * noise(k)).detach().float()
    torch.testing.assert_close(tta.project(reference, seeds=[4]), x0.detach().clamp(-1, 1), atol=1e-5, rtol=1e-5)
    assert x0.abs().max() > 1  # so that clamping was seen
    unguided = gda(models, start=3, weights=NOTHING).project(reference, seeds=[4])
    assert (unguided - x0.detach().clamp(-1, 1)).abs().max() > 1e-3


class Sharp(torch.nn.Module):
    """A classifier with more of an opinion than random weights have."""

    input_size = 16

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return 100 * self.model(x)


def loss_at(tta, x):
    """The loss at x, taken for x_t as well."""
    conditioning = tta.adm.conditioning(torch.tensor([80]))
    features = encoder_features(tta.adm, x, conditioning)
    return tta.loss(x, features, IMAGES[:1], conditioning, generator(0, 0))


def test_every_term_pulls(models, monkeypatch):
    """Each term, alone and small, lowers itself: descending its gradient by a little makes it less.

    AugMix's mixtures, which jump with a level of 8 bits and are constants to the gradient, stand still.
    """
    mixed = torch.full((3, 1, 1, 1), 0.6), torch.zeros(3, 3, 16, 16)
    monkeypatch.setattr(gda_module, "augmix_parts", lambda views, rng: mixed)
    bright = lambda x: x.mean((1, 2, 3)).tanh()  # noqa: E731
    features = lambda x: [F.avg_pool2d(x, 2), x.square()]  # noqa: E731
    moved = IMAGES[:1] * 0.5
    for name in WEIGHTS:
        tta = gda(models, style=bright, content=features, weights={**NOTHING, name: 1.0})
        tta.model = Sharp(models[0])
        x = moved.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss_at(tta, x), x)
        assert g.abs().max() > 0, name
        assert loss_at(tta, moved - 1e-3 * g / g.norm()) < loss_at(tta, moved), name


def test_terms_add_up_and_missing_networks_leave_theirs_out(models):
    def loss(**options):
        with torch.no_grad():
            return loss_at(gda(models, **options), IMAGES[:1] * 0.5).item()

    alone = {n: loss(weights={**NOTHING, n: WEIGHTS[n]}) for n in ("marginal", "pixel")}
    both = loss(weights={"patch": 0.0})
    assert both == pytest.approx(alone["marginal"] + alone["pixel"], rel=1e-5)
    assert loss(weights={"patch": 0.0}, style=lambda x: x.new_full((len(x),), 0.5)) == pytest.approx(both + 2500)
    assert loss(weights=NOTHING) == 0


def test_the_contrastive_term_sees_what_the_step_computed(models, monkeypatch):
    """The encoder's features of x_t are those of the pass that denoises it, and pull on x_t."""
    tta, seen = gda(models, start=2, weights={**NOTHING, "patch": 1.0}), []
    loss = tta.loss
    monkeypatch.setattr(tta, "loss", lambda *a: seen.append(a) or loss(*a))
    tta.project(IMAGES[:1], seeds=[4])
    ((_, features, _, conditioning, _),) = seen
    noise = philox_normal(IMAGES[:1].shape, seed=0, identities=[4], step=0)
    abar = tta.schedule.alphas_cumprod[1]
    x = abar.sqrt().float() * IMAGES[:1] + (1 - abar).sqrt().float() * noise
    expected = encoder_features(tta.adm, x, conditioning)
    assert len(features) == len(expected)
    for found, wanted in zip(features, expected, strict=True):
        torch.testing.assert_close(found, wanted)
        assert found.requires_grad


def test_a_result_depends_on_the_image_and_its_identity_alone(models):
    tta = gda(models)
    together = tta.project(IMAGES, seeds=[5, 6, 7])
    assert together.shape == IMAGES.shape
    assert together.abs().max() <= 1
    assert torch.equal(tta.project(IMAGES.flip(0), seeds=[7, 6, 5]), together.flip(0))
    assert torch.equal(tta.project(IMAGES[[2]], seeds=[7]), together[[2]])
    assert not torch.equal(tta.project(IMAGES[[2]], seeds=[8]), together[[2]])
    assert tta.per_image


def test_the_surer_prediction_counts(models, monkeypatch):
    tta = gda(models)
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]])
    q = torch.tensor([[0.7, 0.3], [0.2, 0.8], [0.5, 0.5]])
    tta.model = torch.nn.Identity()
    monkeypatch.setattr(gda_module, "resized", lambda x, size: x)
    assert torch.equal(tta.scores(p.log(), q.log()).round(decimals=5), torch.stack([p[0], q[1], p[2]]))


def test_a_call_projects_or_takes_a_projection(models):
    tta = gda(models)
    projected = tta.project(IMAGES, seeds=[1, 2, 3])
    assert torch.equal(tta(IMAGES, seeds=[1, 2, 3]), tta(IMAGES, projected))


def test_image_and_projection_show_the_same(models):
    """The ADM sees 16 pixels of what are 20; the classifier, which cuts 16 of them out, must see the same part."""
    tta, seen = gda(models, start=1), []
    images = F.interpolate(IMAGES[:1], (20, 20), mode="bilinear")
    tta.model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0]))
    assert tta(images).shape == (1, 3)
    assert [x.shape for x in seen] == [images.shape] * 2
    assert F.mse_loss(seen[1], seen[0]) < 0.2 * F.mse_loss(seen[1].roll(2, -1), seen[0])


def test_features(models):
    adm = models[1]
    features = encoder_features(adm, IMAGES, adm.conditioning(torch.tensor([80])))
    assert [f.shape[0] for f in features] == [3] * len(features)
    assert 1 <= len(features) < len(adm.input_blocks)


def test_wrong_use(models, tiny):
    with pytest.raises(SdaError, match="start=51 is out of range: respacing '50' has 50 steps"):
        gda(models, start=51)
    with pytest.raises(SdaError, match="views=0 is out of range"):
        gda(models, views=0)
    with pytest.raises(SdaError, match="GDA has no term 'clip'; choose from marginal, pixel, patch, style, content"):
        gda(models, weights={"clip": 1.0})
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(SdaError, match=f"the weight {weight} of GDA's patch is out of range: give 0 or more"):
            gda(models, weights={"patch": weight})
    with pytest.raises(SdaError, match="class-conditional; GDA needs an unconditional one"):
        gda((models[0], load_adm(tiny.save("adm", "conditional-gda", num_classes=3))))
