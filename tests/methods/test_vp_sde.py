"""DiffPure's reverse SDE against the formula written out, its cost, its noise, and wrong use."""

import math
import sys

import pytest
import torch

from sda_fast.diffusion import Schedule
from sda_fast.errors import SdaError
from sda_fast.methods import create
from sda_fast.methods.vp_sde import SDEPurifier
from sda_fast.models import load_adm
from sda_fast.projector import Purifier
from sda_fast.weights import weights_path

pytest.importorskip("torchsde", reason='needs pip install "sda-fast[diffpure]"')

IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def adm(tiny):
    return load_adm(tiny.adm)


def count(module):
    """The images that pass a module, by call."""
    seen = []
    module.out[2].register_forward_hook(lambda layer, inputs, output: seen.append(len(output)))
    return seen


def told(start, k):
    """floor(1000 t) as float32 computes it, on either side of where 1000 t is whole."""
    s = torch.tensor(1 - start / 1000)
    for _ in range(k):
        s = s + 1e-3
    timestep = int(1000 * (1 - s))
    assert timestep in (start - k - 1, start - k)
    return timestep


def test_euler_steps_by_hand(adm):
    """The reverse SDE in its usual direction: x <- x - (f - g^2 score) dt + g sqrt(dt) z, time running down."""
    start = 20
    noise = torch.randn(start + 1, 3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    abar = Schedule.linear().alphas_cumprod[start - 1].item()
    x = math.sqrt(abar) * IMAGES + math.sqrt(1 - abar) * noise[0]
    for k in range(start):
        t = start / 1000 - k / 1000
        dt = 1e-3 if k < start - 1 else t - 1e-5
        beta, integral = 0.1 + 19.9 * t, 0.1 * t + 19.9 * t**2 / 2
        with torch.no_grad():
            eps = adm(x, torch.full((3,), told(start, k)))[:, :3]
        score = -eps / math.sqrt(1 - math.exp(-integral))
        x = x - (-beta * x / 2 - beta * score) * dt + math.sqrt(beta * dt) * noise[k + 1]
    purified = SDEPurifier(adm, start)(IMAGES, noise=noise)
    assert ((purified - x).abs().max() / x.abs().max()).item() <= 1e-4


def test_the_published_cost(adm):
    seen = count(adm)
    purifier = SDEPurifier(adm)
    purifier(IMAGES[:1])
    assert seen == [1] * 150
    cost = create("diffpure", torch.nn.Flatten(), projector=purifier).cost()
    assert cost == (1, 0, 150, 0)


def test_an_image_depends_on_its_identity_alone(adm):
    purifier = SDEPurifier(adm, 5, batch_size=2)
    together = purifier(IMAGES, seeds=[5, 6, 7])
    assert torch.equal(purifier(IMAGES.flip(0), seeds=[7, 6, 5]), together.flip(0))
    assert torch.equal(purifier(IMAGES[[2]], seeds=[7]), together[[2]])
    assert not torch.equal(purifier(IMAGES[[2]], seeds=[8]), together[[2]])
    assert not torch.equal(SDEPurifier(adm, 5, batch_size=2, seed=1)(IMAGES, seeds=[5, 6, 7]), together)
    assert purifier(IMAGES[:0]).shape == (0, 3, 16, 16)


def test_a_trained_model_is_led_along_the_ancestral_path():
    """From the same noise, the SDE and ancestral sampling discretise one process: they end close to each other."""
    adm = load_adm(weights_path("photos:adm"))
    ramp = torch.linspace(-0.8, 0.8, 32)
    images = torch.stack([ramp[None] + 0 * ramp[:, None], ramp[:, None] * ramp[None], 0 * ramp[:, None] + ramp])
    images = images[None].contiguous()
    solved, sampled, other = SDEPurifier(adm, 60)(images), Purifier(adm, 60)(images), Purifier(adm, 60, seed=1)(images)
    assert (solved - sampled).abs().mean() < 0.2 * (other - sampled).abs().mean()


def test_little_noise_leaves_the_image(adm):
    assert (SDEPurifier(adm, 1)(IMAGES) - IMAGES).abs().mean() < 0.05


def test_wrong_use(adm, tiny, monkeypatch):
    with pytest.raises(SdaError, match="start=1000 is out of range"):
        SDEPurifier(adm, 1000)
    with pytest.raises(SdaError, match="batch_size=0 is out of range"):
        SDEPurifier(adm, batch_size=0)
    with pytest.raises(SdaError, match="this ADM is class-conditional"):
        SDEPurifier(load_adm(tiny.save("adm", "conditional", num_classes=3)))
    monkeypatch.setitem(sys.modules, "torchsde", None)
    with pytest.raises(SdaError, match=r'needs torchsde: pip install "sda-fast\[diffpure\]"'):
        SDEPurifier(adm)
