"""MEMO against the original's numbers; its views; and that an image's result depends on that image alone."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn

from sda_fast.data import to_uint8, to_unit
from sda_fast.errors import SdaError
from sda_fast.methods import augmix, create
from sda_fast.methods.adaptation import generator
from sda_fast.methods.memo import marginal_entropy, memo_step

SGD = partial(torch.optim.SGD, lr=0.05)
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def reference(load_reference, load_weights, reference_network):
    tensors, _ = load_reference("memo")
    return reference_network(load_weights(tensors)), tensors


def test_loss_adapted_parameters_and_prediction_match_the_original(reference, relative):
    network, tensors = reference
    tta = create("memo", network, optimizer=SGD)
    with torch.no_grad():
        assert relative(tta.adapted(tensors["views"]), tensors["view_logits"]) <= 1e-5
    assert relative(memo_step(tta.adapted, tensors["views"], tta.optimizer), tensors["loss"]) <= 1e-5
    for name, value in tta.adapted.named_parameters():
        assert relative(value.detach(), tensors[f"adapted/{name}"]) <= 1e-5
        assert not torch.equal(value, tensors[f"weights/{name}"])
    with torch.no_grad():
        assert relative(tta.adapted(tensors["image"]), tensors["logits"]) <= 1e-5


def test_a_call_is_a_step_on_the_views_and_a_prediction(reference, relative, monkeypatch):
    network, tensors = reference
    monkeypatch.setattr("sda_fast.methods.memo.augmix_views", lambda *_: tensors["views"])
    tta = create("memo", network, optimizer=SGD)
    assert relative(tta(tensors["image"]), tensors["logits"].softmax(1)) <= 1e-5
    for name, value in tta.adapted.named_parameters():
        assert torch.equal(value, tensors[f"weights/{name}"]), "weights are reloaded"


@pytest.mark.parametrize("optimizer", [SGD, partial(torch.optim.AdamW, lr=1e-2)])
def test_a_result_depends_on_the_image_and_its_identity_alone(reference, optimizer):
    network, _ = reference
    tta = create("memo", network, optimizer=optimizer, views=4)
    together = tta(IMAGES, seeds=[5, 6, 7])
    assert torch.equal(tta(IMAGES[[2]], seeds=[7]), together[[2]])
    assert torch.equal(tta(IMAGES.flip(0), seeds=torch.tensor([7, 6, 5])), together.flip(0))
    assert not torch.equal(tta(IMAGES[[2]], seeds=[8]), together[[2]])
    assert tta.per_image


def test_the_published_leak_of_the_optimizer(reference):
    network, _ = reference
    adamw = partial(torch.optim.AdamW, lr=1e-2)
    clean = create("memo", network, optimizer=adamw, views=4)(IMAGES)
    tta = create("memo", network, optimizer=adamw, views=4, leak_optimizer_state=True)
    leaky = tta(IMAGES)
    assert torch.equal(leaky[0], clean[0])
    assert not torch.equal(leaky[1], clean[1])
    assert not tta.per_image
    tta.reset()
    assert torch.equal(tta(IMAGES), leaky)


def test_the_published_optimizers(reference):
    sgd = create("memo", reference[0]).optimizer
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.defaults.items() >= {"lr": 2.5e-4, "momentum": 0, "weight_decay": 0, "nesterov": False}.items()
    adamw = create("memo", nn.Sequential(nn.Flatten(), nn.LayerNorm(4))).optimizer
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults.items() >= {"lr": 1e-5, "weight_decay": 0.01}.items()


def test_without_prior_the_source_statistics_stand(reference):
    network, _ = reference
    tta = create("memo", network, prior=None, optimizer=partial(torch.optim.SGD, lr=0.0), views=1)
    with torch.no_grad():
        torch.testing.assert_close(tta(IMAGES), network(IMAGES).softmax(1))
        mixed = create("memo", network, optimizer=partial(torch.optim.SGD, lr=0.0), views=1)(IMAGES)
    assert not torch.allclose(mixed, network(IMAGES).softmax(1), atol=1e-5)


def test_a_map_of_one_pixel_has_no_variance():
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Flatten()).eval()
    tta = create("memo", network, views=2, optimizer=partial(torch.optim.SGD, lr=0.0))
    with torch.no_grad():
        torch.testing.assert_close(tta(IMAGES), network(IMAGES).softmax(1))


def test_marginal_entropy_by_hand():
    p = torch.tensor([[0.8, 0.2], [0.4, 0.6]])
    assert marginal_entropy(p.log()).item() == pytest.approx(-(0.6 * np.log(0.6) + 0.4 * np.log(0.4)))


def test_views_are_pictures_and_reproducible():
    views = augmix.augmix_views(IMAGES[0], 12, generator(0, 1))
    assert views.shape == (12, 3, 16, 16)
    assert views.dtype == torch.float32
    assert views.abs().max() <= 1
    assert torch.equal(views, augmix.augmix_views(IMAGES[0], 12, generator(0, 1)))
    for seed, identity in ((1, 1), (0, 2)):
        assert not torch.equal(views, augmix.augmix_views(IMAGES[0], 12, generator(seed, identity)))
    assert len({v.numpy().tobytes() for v in views}) == 12
    assert augmix.augmix_views(IMAGES[0], 2, generator(0, 1), size=8).shape == (2, 3, 8, 8)


def test_views_do_not_depend_on_threads():
    image = (torch.rand(3, 20, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1).requires_grad_()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 16):
            torch.set_num_threads(threads)
            parts = augmix.augmix_parts(image.expand(40, -1, -1, -1), generator(0, 1))
            results.append((augmix.augmix_views(image, 40, generator(0, 1)), *parts))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_a_mixture_by_hand():
    """Of chains that change nothing the mixture is the picture, as `to_unit` has it."""
    picture = Image.fromarray(to_uint8(IMAGES[:1])[0])
    mixing = augmix.Mixing(0.5, [0.25, 0.25, 0.5], [[], [lambda p: p], [lambda p: p] * 2])
    mixture = torch.from_numpy(augmix._mixture(picture, mixing)).permute(2, 0, 1)
    assert torch.equal(mixture, to_unit(to_uint8(IMAGES[:1])[0])[0])


@pytest.mark.parametrize("identity", range(4))
def test_a_view_drawn_and_made_step_by_step(identity):
    """The order of the draws and the arithmetic, which evaluations begun by an earlier version share."""
    rng = generator(0, identity)
    picture = Image.fromarray(to_uint8(IMAGES[:1])[0])
    crop = augmix.random_resized_crop(rng, (16, 16), 12)(picture)
    if rng.random() < 0.5:
        crop = ImageOps.mirror(crop)
    weights, m = rng.dirichlet([1.0] * 3), rng.beta(1.0, 1.0)
    mixture = torch.zeros(1, 3, 12, 12)
    for weight in weights:
        chain = crop
        for _ in range(rng.integers(1, 4)):
            operation = augmix.OPERATIONS[rng.integers(9)]
            chain = operation(rng, chain.size, augmix.DARK_RED)(chain)
        mixture += float(weight) * to_unit(np.array(chain))
    view = float(m) * to_unit(np.array(crop)) + (1 - float(m)) * mixture
    assert torch.equal(augmix.augmix_views(IMAGES[0], 1, generator(0, identity), 12), view)


def test_with_one_thread_the_work_is_done_in_the_callers(one_thread, monkeypatch):
    """Studies take the time of a method's own thread."""
    monkeypatch.setattr(augmix, "ThreadPoolExecutor", lambda _: pytest.fail("a thread"))
    assert augmix.augmix_views(IMAGES[0], 3, generator(0, 1)).shape == (3, 3, 16, 16)


def test_moved_pictures_show_red_beyond_their_edge():
    own, red = (200, 100, 50), augmix.DARK_RED
    picture = Image.new("RGB", (120, 120), own)
    for operation in (augmix._translate_x, augmix._translate_y, augmix._rotate, augmix._shear_x, augmix._shear_y):
        moved = [operation(generator(0, identity), picture.size, red)(picture) for identity in range(20)]
        assert {own, red} <= {colour for m in moved for _, colour in m.getcolors(1 << 20)}, operation
    assert Image.new("RGB", (1, 1), 128).getpixel((0, 0)) == red, "how Pillow reads one number"


def test_crops_cover_and_stay_inside():
    ramp = np.arange(40 * 60, dtype=np.uint8).reshape(40, 60)
    picture = Image.fromarray(np.stack([ramp] * 3, -1))
    for identity in range(50):
        assert augmix.random_resized_crop(generator(0, identity), picture.size, 8)(picture).size == (8, 8)
    line = Image.fromarray(np.full((2, 200, 3), 7, np.uint8))  # no draw fits into it
    crop = augmix.random_resized_crop(generator(0, 0), line.size, 8)(line)
    assert crop.getcolors() == [(64, (7, 7, 7))]


def test_parts_mix_to_a_view():
    m, mixtures = augmix.augmix_parts(IMAGES[:1].expand(5, -1, -1, -1), generator(0, 1))
    assert m.shape == (5, 1, 1, 1)
    assert mixtures.shape == (5, 3, 16, 16)
    assert 0 <= m.min() <= m.max() <= 1
    assert to_uint8(mixtures).shape == (5, 16, 16, 3)


def test_wrong_use():
    network = nn.Flatten(), nn.Linear(3, 2)
    with pytest.raises(SdaError, match="views=0, steps=1 are out of range"):
        create("memo", nn.Sequential(*network), views=0)
    with pytest.raises(SdaError, match="prior=-1 is out of range: 16 is published"):
        create("memo", nn.Sequential(*network), prior=-1)
