"""GDA, of which there are no numbers to compare with: its steps by hand, its terms, and who depends on whom."""

import math

import pytest
import torch
from torch.nn import functional as F

from sda_fast.errors import SdaError
from sda_fast.methods import create
from sda_fast.methods.adaptation import generator
from sda_fast.methods.gda import WEIGHTS, encoder_features, random_patches
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
    """The published update on another path: the pixel term alone, all from the schedule's own tables."""
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
        f = math.sqrt(1 - abar)
        (g,) = torch.autograd.grad(-2000.0 * F.mse_loss(f * x0 + (1 - f) * x, reference), x)
        variance = torch.exp((v + 1) / 2 * s.betas[i].log() + (1 - v) / 2 * s.posterior_log_variance_clipped[i])
        mean = s.posterior_mean_coef1[i] * x0 + s.posterior_mean_coef2[i] * x
        x = (mean + variance * g + (i > 0) * variance.sqrt() * noise(k)).detach().float()
    torch.testing.assert_close(tta.project(reference, seeds=[4]), x, atol=1e-5, rtol=1e-5)


def test_every_term_pulls(models):
    """Each term, alone and small, lowers itself: descending its gradient by a little makes it less."""
    bright = lambda x: x.mean((1, 2, 3)).tanh()  # noqa: E731
    features = lambda x: [F.avg_pool2d(x, 2), x.square()]  # noqa: E731
    moved = IMAGES[:1] * 0.5
    for name in WEIGHTS:
        tta = gda(models, style=bright, content=features, weights={**NOTHING, name: 1.0})
        conditioning = tta.adm.conditioning(torch.tensor([80]))

        def loss(x, tta=tta, conditioning=conditioning):
            return tta.loss(x, IMAGES[:1], conditioning, generator(0, 0))

        x = moved.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(x), x)
        assert g.abs().max() > 0, name
        assert loss(moved - 1e-3 * g / g.norm()) < loss(moved), name


def test_terms_add_up_and_missing_networks_leave_theirs_out(models):
    tta = gda(models)
    conditioning = tta.adm.conditioning(torch.tensor([80]))

    def loss(**options):
        with torch.no_grad():
            return gda(models, **options).loss(IMAGES[:1] * 0.5, IMAGES[:1], conditioning, generator(0, 0)).item()

    alone = {n: loss(weights={**NOTHING, n: WEIGHTS[n]}) for n in ("marginal", "pixel")}
    both = loss(weights={"patch": 0.0})
    assert both == pytest.approx(alone["marginal"] + alone["pixel"], rel=1e-5)
    assert loss(weights={"patch": 0.0}, style=lambda x: x.new_full((len(x),), 0.5)) == pytest.approx(both + 2500)
    assert loss(weights=NOTHING) == 0


def test_a_result_depends_on_the_image_and_its_identity_alone(models):
    tta = gda(models)
    together = tta.project(IMAGES, seeds=[5, 6, 7])
    assert together.shape == IMAGES.shape
    assert torch.equal(tta.project(IMAGES.flip(0), seeds=[7, 6, 5]), together.flip(0))
    assert torch.equal(tta.project(IMAGES[[2]], seeds=[7]), together[[2]])
    assert not torch.equal(tta.project(IMAGES[[2]], seeds=[8]), together[[2]])
    assert tta.per_image


def test_the_surer_prediction_counts(models):
    tta = gda(models)
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]])
    q = torch.tensor([[0.7, 0.3], [0.2, 0.8], [0.5, 0.5]])
    tta.model = torch.nn.Identity()
    assert torch.equal(tta.scores(p.log(), q.log()).round(decimals=5), torch.stack([p[0], q[1], p[2]]))


def test_a_call_projects_or_takes_a_projection(models):
    tta = gda(models)
    projected = tta.project(IMAGES, seeds=[1, 2, 3])
    assert torch.equal(tta(IMAGES, seeds=[1, 2, 3]), tta(IMAGES, projected))
    assert tta(torch.rand(1, 3, 20, 20)).shape == (1, 3)  # scaled to the ADM's size


def test_features_and_patches(models):
    adm = models[1]
    features = encoder_features(adm, IMAGES, adm.conditioning(torch.tensor([80])))
    assert [f.shape[0] for f in features] == [3] * len(features)
    assert 1 <= len(features) < len(adm.input_blocks)
    assert random_patches(IMAGES[:1], 5, generator(0, 0)).shape == (5, 3, 16, 16)


def test_wrong_use(models, tiny):
    with pytest.raises(SdaError, match="start=51 is out of range: respacing '50' has 50 steps"):
        gda(models, start=51)
    with pytest.raises(SdaError, match="views=0 is out of range"):
        gda(models, views=0)
    with pytest.raises(SdaError, match="GDA has no term 'clip'; choose from marginal, pixel, patch, style, content"):
        gda(models, weights={"clip": 1.0})
    with pytest.raises(SdaError, match="class-conditional; GDA needs an unconditional one"):
        gda((models[0], load_adm(tiny.save("adm", "conditional-gda", num_classes=3))))
