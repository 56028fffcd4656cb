import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from sda_fast.data import read_image, to_unit
from sda_fast.errors import SdaError
from sda_fast.models import load_classifier
from sda_fast.models.checkpoints import read_checkpoint
from sda_fast.stages import finetune as stage
from sda_fast.stages.finetune import MODEL, finetune, learning_rate, make_augment, make_optimizer
from sda_fast.stages.recipes import RECIPES, Recipe, recipe_for

QUICK = Recipe("adamw", 1e-2, 0.05, 4, 3, "cosine", warmup_epochs=1, clip_norm=5.0, augment="shift-flip")
NAMES = [f"{name}/{index}.png" for name in ("ant", "bee", "cow") for index in range(3)]  # 9 images: 4 + 5


@pytest.fixture
def images(tmp_path, write_images):
    return write_images(tmp_path / "images", NAMES)


@pytest.mark.parametrize("name", ["resnet", "convnext"])
def test_a_new_model_in_the_old_format(tmp_path, images, tiny, name):
    path = getattr(tiny, name)
    summary = finetune(images, tmp_path / "out", path, QUICK)
    target = tmp_path / "out" / MODEL
    assert summary.pop("loss") > 0
    assert summary == {"images": 9, "epochs": 3, "output": str(target)}
    (before, metadata), (after, kept) = read_checkpoint(path), read_checkpoint(target)
    assert metadata == kept
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {k: (v.shape, v.dtype) for k, v in after.items()}
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(moved) > 0.9 * len(before)
    if name == "resnet":
        assert any(key.endswith("running_mean") for key in moved)  # BatchNorm statistics move with the data
    model = load_classifier(target)
    assert model.classes == tiny.classes
    assert model(torch.zeros(1, 3, 16, 16)).isfinite().all()

    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"]["recipe"]["lr"] == 1e-2
    assert len(manifest["finished"]["loss_per_epoch"]) == 3
    times = target.stat().st_mtime_ns
    assert finetune(images, tmp_path / "out", path, QUICK) == summary
    assert target.stat().st_mtime_ns == times


def test_labels_go_by_the_name_of_the_folder(tmp_path, tiny, write_images):
    """One class alone: the model comes to know its folder's class, not the first."""
    images = write_images(tmp_path / "images", [f"x/bee/{i}.png" for i in range(8)])
    finetune(images, tmp_path / "out", tiny.convnext, replace(QUICK, epochs=6))
    x = torch.cat([to_unit(read_image(path)) for path in images.rglob("*.png")])
    assert load_classifier(tmp_path / "out" / MODEL)(x).argmax(1).tolist() == [1] * 8
    write_images(images, ["dog/1.png"])
    with pytest.raises(SdaError, match=r"the folder dog of .* is none of the 3 classes"):
        finetune(images, tmp_path / "other", tiny.convnext, QUICK)


@pytest.mark.parametrize("name", ["resnet", "convnext"])
@pytest.mark.parametrize("at", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_an_interrupted_run_goes_on_to_the_same_model(tmp_path, images, tiny, monkeypatch, name, at):
    """Interrupted at the border of two epochs or within one."""
    recipe = replace(QUICK, augment="randaugment" if name == "convnext" else "shift-flip")
    model = getattr(tiny, name)

    def stop(recipe, epoch):
        if epoch >= at:
            raise KeyboardInterrupt
        return learning_rate(recipe, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "learning_rate", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(images, tmp_path / "out", model, recipe)
    assert not (tmp_path / "out" / MODEL).exists()
    random.seed(at)  # what happened before must not matter
    torch.manual_seed(int(at))
    finetune(images, tmp_path / "out", model, recipe)
    finetune(images, tmp_path / "whole", model, recipe)
    assert (tmp_path / "out" / MODEL).read_bytes() == (tmp_path / "whole" / MODEL).read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", MODEL]


def test_seed_data_and_recipe_are_not_mixed(tmp_path, images, tiny, write_images):
    finetune(images, tmp_path / "out", tiny.resnet, QUICK)
    finetune(images, tmp_path / "other", tiny.resnet, QUICK, seed=1)
    assert (tmp_path / "out" / MODEL).read_bytes() != (tmp_path / "other" / MODEL).read_bytes()
    for changes, message in (
        ({"seed": 1}, "made with seed = 0, this run has seed = 1"),
        ({"recipe": replace(QUICK, lr=1.0)}, r"recipe\.lr = 0\.01, this run has recipe\.lr = 1\.0"),
        ({"model": tiny.convnext}, r"weights\.model = "),
    ):
        with pytest.raises(SdaError, match=message):
            finetune(images, tmp_path / "out", **{"model": tiny.resnet, "recipe": QUICK, **changes})
    (images / "ant").rename(images / "tmp")
    (images / "bee").rename(images / "ant")
    (images / "tmp").rename(images / "bee")
    with pytest.raises(SdaError, match="made with data = "):
        finetune(images, tmp_path / "out", tiny.resnet, QUICK)


def test_a_single_image_is_no_batch(tmp_path, tiny, write_images):
    """BatchNorm at one pixel needs two images: 9 images in batches of 4 end with 5, not with 4 and 1."""
    assert stage._batches(9, 4) == [slice(0, 4), slice(4, 9)]
    assert stage._batches(8, 4) == [slice(0, 4), slice(4, 8)]
    assert stage._batches(10, 4) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert stage._batches(3, 4) == [slice(0, 3)]
    alone = write_images(tmp_path / "alone", ["ant/1.png"])
    with pytest.raises(SdaError, match="holds a single image"):
        finetune(alone, tmp_path / "out", tiny.resnet, QUICK)


@pytest.mark.parametrize(
    ("recipe", "rates"),
    [
        # Paper, table 7: SGD 5e-4, a tenth at epoch 10 of 15.
        ("resnet", {0: 5e-4, 0.5: 5e-4, 9.99: 5e-4, 10: 5e-5, 14.5: 5e-5}),
        # AdamW 2e-5 after 5 epochs of linear warm-up, then cosine per epoch to a hundredth: at half time
        # 2e-5 (0.01 + 0.99 / 2), in the last epoch 2e-5 (0.01 + 0.99 (1 - cos(pi / 10)) / 2).
        (
            "transformer",
            {0: 2e-13, 1: 4e-6, 2.5: 1e-5, 4.75: 1.9e-5, 5: 2e-5, 5.9: 2e-5, 10: 1.01e-5, 14: 6.8454e-7},
        ),
    ],
)
def test_learning_rates_of_the_paper(recipe, rates):
    for epoch, rate in rates.items():
        assert learning_rate(RECIPES[recipe], epoch) == pytest.approx(rate, rel=1e-4)


def test_recipes_of_the_paper(tiny):
    resnet, transformer = RECIPES["resnet"], RECIPES["transformer"]
    assert (resnet.batch_size, resnet.epochs, resnet.clip_norm, resnet.label_smoothing) == (512, 15, None, 0.0)
    assert (transformer.batch_size, transformer.epochs) == (1024, 15)
    assert (transformer.clip_norm, transformer.label_smoothing) == (5.0, 0.1)

    optimizer = make_optimizer(load_classifier(tiny.resnet), resnet)
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (5e-4, 0.9, 1e-4)
    assert not group["nesterov"]

    model = load_classifier(tiny.convnext)
    optimizer = make_optimizer(model, transformer)
    assert isinstance(optimizer, torch.optim.AdamW)
    decayed, plain = optimizer.param_groups
    assert (decayed["lr"], decayed["betas"], decayed["weight_decay"]) == (2e-5, (0.9, 0.999), 1e-8)
    assert plain["weight_decay"] == 0.0
    assert {p.ndim for p in plain["params"]} == {1}
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_recipe_by_architecture():
    assert recipe_for(None, "resnet50") is recipe_for(None, "resnext50_32x4d") is RECIPES["resnet"]
    assert recipe_for(None, "swin_tiny_patch4_window7_224") is recipe_for(None, "convnext_tiny")
    assert recipe_for(None, "convnext_tiny") is RECIPES["transformer"]
    assert recipe_for("photos", "resnet18") is RECIPES["photos"]
    with pytest.raises(SdaError, match="recipe 'resnet50' is not known; choose from resnet, transformer, photos"):
        recipe_for("resnet50", "resnet50")


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("size", [(16, 16), (24, 20)])
def test_augmented_images_are_images(name, size):
    augment = make_augment(RECIPES[name], 16)
    image = np.random.default_rng(0).integers(256, size=(*size, 3), dtype=np.uint8)

    def draw(epoch):
        stage._seed_everything(0, epoch)
        return torch.stack([augment(image) for _ in range(40)])

    x = draw(0)
    assert x.shape == (40, 3, 16, 16)
    assert x.dtype == torch.float32
    assert x.min() >= -1
    assert x.max() <= 1
    assert x.std() > 0.3
    assert len({part.numpy().tobytes() for part in x}) > 20
    assert torch.equal(x, draw(0))
    assert not torch.equal(x, draw(1))


def test_an_augmentation_that_changes_little_keeps_the_levels():
    """Black stays -1 and white 1, whatever the classifier's own normalisation."""
    for recipe in (RECIPES["resnet"], RECIPES["photos"]):
        augment = make_augment(recipe, 16)
        for level in (0, 127, 255):
            x = augment(np.full((16, 16, 3), level, np.uint8))
            assert x.sub(level / 127.5 - 1).abs().max() < 1e-6


def test_images_smaller_than_the_model_are_refused(tmp_path, tiny, write_images):
    small = write_images(tmp_path / "small", ["ant/1.png", "ant/2.png"], size=(20, 10))
    with pytest.raises(SdaError, match="images of 20x10 are smaller than the classifier's 16x16"):
        finetune(small, tmp_path / "out", tiny.resnet, QUICK)


def test_a_loss_that_explodes_is_reported(tmp_path, images, tiny):
    with pytest.raises(SdaError, match=r"the loss became (nan|inf) in epoch \d: lower the learning rate"):
        finetune(images, tmp_path / "out", tiny.resnet, replace(QUICK, lr=1e30, warmup_epochs=0, clip_norm=None))


def test_a_negative_seed_is_refused(tmp_path, images, tiny):
    with pytest.raises(SdaError, match="--seed -1 is out of range"):
        finetune(images, tmp_path / "out", tiny.resnet, QUICK, seed=-1)
