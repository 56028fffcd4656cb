"""Projector and Purifier: the published runs, the reference, explicit noise, and wrong use."""

import math

import pytest
import torch

from sda_fast import Projector
from sda_fast.errors import SdaError
from sda_fast.models import ADM, load_adm
from sda_fast.ops import philox_normal
from sda_fast.projector import Purifier
from sda_fast.reference import UNet, diffpure, guided_projection

# Three steps: a pixel that rounding carries across the clamp's edge is guided otherwise, and each step may have one.
SHORT = {"respacing": "6", "start": 3, "factor": 2, "scale": 3.0}
SEEDS = torch.tensor([11, -3, 2**62])


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


IMAGES = draw(3, 3, 16, 16).clamp(-1, 1)
NOISE = draw(4, 3, 3, 16, 16, seed=1)


@pytest.fixture(scope="module")
def original(load_reference, load_weights):
    """The ADM that made the published runs."""
    tensors, meta = load_reference("adm_tiny")
    adm = ADM(**meta["config"]).eval()
    adm.load_state_dict(load_weights(tensors))
    return adm


@pytest.fixture(scope="module")
def adm(tiny):
    return load_adm(tiny.adm)


@pytest.fixture
def unet(request, tiny):
    """(ADM, the reference's network with the same weights, name of its variance); `request.param` varies the ADM."""
    changes = getattr(request, "param", {})
    adm = load_adm(tiny.save("adm", "varied_" + "_".join(map(str, changes.values())), **changes))
    unet = UNet(**adm.config).eval()
    unet.load_state_dict(adm.state_dict())
    return adm, unet, "learned_range" if adm.out_channels == 6 else "fixed_large"


def largest_mean_error(ours, theirs):
    errors = [float((a - b).abs().mean()) for a, b in zip(ours, theirs, strict=True)]
    return max(errors), errors.index(max(errors)) + 1


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dda_batch2", {"norm": "batch", "norm_group": 2}),
        ("dda_batch1", {"norm": "batch", "norm_group": 1}),
        ("dda_batch1", {"norm": "image", "norm_group": 1}),
        ("dda_batch2", {"norm": "batch", "norm_group": 2, "batch_size": 4}),
    ],
)
def test_whole_runs_match_the_original(load_reference, original, name, settings):
    tensors, meta = load_reference(name)
    projector = Projector(original, meta["respacing"], meta["start_step"], meta["factor"], meta["scale"], **settings)
    error, step = largest_mean_error(projector.steps(tensors["reference"], tensors["noise"]), tensors["samples"])
    print(f"{name} {settings}: mean error at most {error:.1e}")
    assert error <= 1e-5, f"mean error {error:.1e} after step {step}"


VARIANTS = [{"seed": 1}, {"seed": 2, "num_res_blocks": 2}, {"seed": 3, "out_channels": 3}]


@pytest.mark.parametrize("unet", VARIANTS, indirect=True, ids=str)
def test_guided_projection_is_that_of_the_reference(unet):
    adm, reference, variance = unet
    theirs = [step.sample for step in guided_projection(reference, IMAGES, NOISE, variance=variance, **SHORT)]
    ours = Projector(adm, norm="batch", norm_group=3, **SHORT).steps(IMAGES, NOISE)
    error, step = largest_mean_error(ours, theirs)
    assert error <= 1e-5, f"mean error {error:.1e} after step {step}"


@pytest.mark.parametrize("unet", VARIANTS, indirect=True, ids=str)
def test_without_the_jacobian_it_is_the_reference_of_a_network_that_has_none(unet):
    adm, reference, variance = unet

    def constant(x, timesteps):
        return reference(x.detach(), timesteps).detach()

    theirs = [step.sample for step in guided_projection(constant, IMAGES, NOISE, variance=variance, **SHORT)]
    exact = [step.sample for step in guided_projection(reference, IMAGES, NOISE, variance=variance, **SHORT)]
    project = Projector(adm, norm="batch", norm_group=3, jacobian_free=True, **SHORT)
    error, step = largest_mean_error(project.steps(IMAGES, NOISE), theirs)
    assert error <= 1e-5, f"mean error {error:.1e} after step {step}"
    assert largest_mean_error(theirs, exact)[0] > 1e-3  # the network's part counts


@pytest.mark.parametrize("norm", ["image", "batch"])
def test_without_the_jacobian_nothing_is_differentiated(adm, monkeypatch, norm):
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: pytest.fail("differentiated"))
    project = Projector(adm, norm=norm, norm_group=3, jacobian_free=True, batch_size=3, **SHORT)
    whole = project(IMAGES, seeds=SEEDS)
    assert torch.equal(project(IMAGES, seeds=SEEDS), whole)
    if norm == "image":
        assert torch.equal(project(IMAGES.flip(0), seeds=SEEDS.flip(0)).flip(0), whole)


@pytest.mark.parametrize("unet", VARIANTS, indirect=True, ids=str)
def test_purification_is_that_of_the_reference(unet):
    adm, reference, variance = unet
    theirs = [step.sample for step in diffpure(reference, IMAGES, NOISE, "6", 3, variance)]
    ours = list(Purifier(adm, 3, "6").steps(IMAGES, NOISE))
    error, step = largest_mean_error(ours, theirs)
    assert error <= 1e-5, f"mean error {error:.1e} after step {step}"
    assert torch.equal(Purifier(adm, 3, "6")(IMAGES, NOISE), ours[-1])


@pytest.mark.parametrize("norm_group", [1, 4, 10])
def test_norm_per_image_is_the_published_one_of_as_many_equal_images(unet, norm_group):
    # One image's own norm times sqrt(g) is the joint norm of g copies, so the guidance is the published one of a
    # batch of one at scale / sqrt(g), and of a batch of g copies at scale.
    adm, reference, _ = unet
    image, noise = IMAGES[:1], NOISE[:, :1]
    ours = Projector(adm, norm="image", norm_group=norm_group, **SHORT)(image, noise)
    weaker = {**SHORT, "scale": SHORT["scale"] / math.sqrt(norm_group)}
    *_, last = guided_projection(reference, image, noise, **weaker)
    assert (ours - last.sample).abs().mean() <= 1e-5
    copies, copied = image.expand(norm_group, -1, -1, -1), noise.expand(-1, norm_group, -1, -1, -1)
    together = Projector(adm, norm="batch", norm_group=norm_group, **SHORT)(copies, copied)
    assert (ours - together).abs().mean() <= 1e-5


def test_norm_groups_of_one_are_images(adm):
    batch, image = (Projector(adm, norm=norm, norm_group=1, **SHORT)(IMAGES, NOISE) for norm in ("batch", "image"))
    assert torch.equal(batch, image)


@pytest.mark.parametrize(
    "make", [lambda adm: Projector(adm, seed=9, **SHORT), lambda adm: Purifier(adm, 3, "6", seed=9)]
)
def test_seeds_name_the_noise(adm, make):
    project = make(adm)
    noise = torch.stack([philox_normal(IMAGES.shape, seed=9, identities=SEEDS, step=k) for k in range(4)])
    assert torch.equal(project(IMAGES, seeds=SEEDS), project(IMAGES, noise=noise))
    assert torch.equal(project(IMAGES), project(IMAGES, seeds=[0, 1, 2]))
    same = project(IMAGES[:1].expand(3, -1, -1, -1), seeds=[5, 5, 6])
    torch.testing.assert_close(same[0], same[1], rtol=0, atol=1e-5)
    assert (same[0] - same[2]).abs().mean() > 1e-3


def test_images_are_left_alone_whatever_their_type_and_layout(adm):
    project, before = Projector(adm, **SHORT), IMAGES.clone()
    expected = project(IMAGES)
    assert expected.dtype == torch.float32
    assert not expected.requires_grad
    assert torch.equal(IMAGES, before)
    for images in (IMAGES.double(), IMAGES.to(memory_format=torch.channels_last), IMAGES.mT.contiguous().mT):
        assert torch.equal(project(images), expected)


def test_between_two_steps_the_caller_may_differentiate(adm):
    for project in (Projector(adm, **SHORT), Purifier(adm, 3, "6")):
        steps = project.steps(IMAGES)
        assert not next(steps).requires_grad
        assert torch.is_grad_enabled()
        with torch.no_grad():
            *_, last = steps
        assert torch.equal(last, project(IMAGES))


@pytest.mark.parametrize("norm", ["image", "batch"])
def test_no_images_give_none(adm, norm):
    projector = Projector(adm, norm=norm, norm_group=2, batch_size=4)
    assert projector(IMAGES[:0]).shape == (0, 3, 16, 16)
    assert projector(IMAGES[:0], seeds=[]).shape == (0, 3, 16, 16)
    assert [x.shape for x in Purifier(adm).steps(IMAGES[:0])] == [(0, 3, 16, 16)]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"start": 0}, "start=0 is out of range"),
        ({"start": 100}, "start=100 is out of range: images are noised at index 100"),
        ({"start": 101}, "start=101 is out of range: respacing '100' has 100 steps"),
        ({"factor": 3}, "D=3 does not divide the image size 16"),
        ({"factor": 0}, "D=0 does not divide"),
        ({"respacing": "1001"}, "respacing '1001'"),
        ({"norm": "pixel"}, "norm 'pixel' is not known"),
        ({"norm_group": 0}, "norm_group=0 is out of range"),
        ({"batch_size": 0}, "batch_size=0 is out of range"),
        ({"norm": "batch", "batch_size": 4}, "batch_size=4 would cut a norm group of 10"),
        ({"engine": "steam"}, "engine 'steam' is not known"),
        ({"precision": "fp8"}, "precision 'fp8' is not known"),
    ],
)
def test_settings_out_of_range(adm, settings, problem):
    with pytest.raises(SdaError, match=problem):
        Projector(adm, **settings)


@pytest.mark.parametrize("start", [0, 1001])
def test_purifying_from_a_step_out_of_range(adm, start):
    with pytest.raises(SdaError, match=f"start={start} is out of range"):
        Purifier(adm, start)


@pytest.mark.parametrize("project", [Projector, Purifier])
def test_class_conditional_models_are_refused(tiny, project):
    adm = load_adm(tiny.save("adm", "conditional", num_classes=3))
    with pytest.raises(SdaError, match="class-conditional"):
        project(adm)


@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode_of_the_caller(tiny, made_inside):
    """The guidance differentiates whatever mode the caller is in, with the same result."""
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    project = Projector(load_adm(tiny.adm), start=2)
    expected = project(images)
    with torch.inference_mode():
        if made_inside:
            project = Projector(load_adm(tiny.adm), start=2)
        assert torch.equal(project(images.clone()), expected)
        assert torch.is_inference_mode_enabled()
    for _ in project.steps(images):
        assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("images", "problem"),
    [
        (torch.zeros(2, 3, 16, 8), r"must be \[N, 3, 16, 16\] .* not \[2, 3, 16, 8\]"),
        (torch.zeros(2, 1, 16, 16), r"not \[2, 1, 16, 16\]"),
        (torch.zeros(3, 16, 16), r"not \[3, 16, 16\]"),
        ([[0.0]], "not list"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), r"floating point in \[-1, 1\], not torch.uint8"),
        (torch.full((1, 3, 16, 16), torch.nan), "NaN or infinity"),
        (torch.full((1, 3, 16, 16), torch.inf), "NaN or infinity"),
        (
            torch.full((1, 3, 16, 16), -255.0),
            r"images reach 255 and must be in \[-1, 1\]; scale \(uint8: x / 127.5 - 1",
        ),
        (torch.full((1, 3, 16, 16), 1.02), r"images reach 1.02 and must be in \[-1, 1\]"),
    ],
)
def test_images_that_do_not_fit(adm, images, problem):
    with pytest.raises(SdaError, match=problem):
        Projector(adm)(images)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"seeds": [1, 2]}, "one integer for each of the 3 images, not shape .2."),
        ({"seeds": [[1], [2], [3]]}, "not shape .3, 1."),
        ({"seeds": [0.5, 1.0, 2.0]}, "seeds must be integers"),
        ({"seeds": [1, 2, 2**63]}, "seeds must be integers in"),
        ({"noise": NOISE[1:]}, r"noise has shape \[3, 3, 3, 16, 16\]; it must be \[4, 3, 3, 16, 16\]"),
        ({"noise": NOISE[:, :2]}, "noise has shape"),
        ({"noise": NOISE, "seeds": [1, 2, 3]}, "either noise or seeds, not both"),
    ],
)
def test_noise_and_seeds_that_do_not_fit(adm, arguments, problem):
    with pytest.raises(SdaError, match=problem):
        Projector(adm, **SHORT)(IMAGES, **arguments)
