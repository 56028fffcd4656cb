import json
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from sda_fast.data import read_image, to_unit
from sda_fast.errors import SdaError
from sda_fast.models import load_classifier
from sda_fast.models.checkpoints import read_checkpoint
from sda_fast.stages import loading, training
from sda_fast.stages.augment import make_augmentation
from sda_fast.stages.finetune import MODEL, finetune
from sda_fast.stages.manifest import Output
from sda_fast.stages.optimization import learning_rate
from sda_fast.stages.recipes import RECIPES, Recipe

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
@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupted_run_goes_on_to_the_same_model(tmp_path, images, tiny, monkeypatch, name, at):
    """Interrupted at the border of two epochs, of two steps each, or within one; with dropped branches."""
    recipe = replace(QUICK, augment="randaugment", drop_path=0.5) if name == "convnext" else QUICK
    model = getattr(tiny, name)

    def stop(recipe, step, steps_per_epoch):
        if step >= at:
            raise KeyboardInterrupt
        return learning_rate(recipe, step, steps_per_epoch)

    with monkeypatch.context() as patch:
        patch.setattr(training, "learning_rate", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(images, tmp_path / "out", model, recipe)
    assert not (tmp_path / "out" / MODEL).exists()
    random.seed(at)  # what happened before must not matter
    torch.manual_seed(at)
    finetune(images, tmp_path / "out", model, recipe)
    finetune(images, tmp_path / "whole", model, recipe)
    assert (tmp_path / "out" / MODEL).read_bytes() == (tmp_path / "whole" / MODEL).read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", MODEL]


def test_stopped_between_the_model_and_the_manifest(tmp_path, images, tiny, monkeypatch):
    """The losses are not lost, and nothing stays behind."""

    def stop(self, summary):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Output, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(images, tmp_path / "out", tiny.resnet, QUICK)
    model = (tmp_path / "out" / MODEL).read_bytes()
    finetune(images, tmp_path / "out", tiny.resnet, QUICK)
    assert (tmp_path / "out" / MODEL).read_bytes() == model
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert len(manifest["finished"]["loss_per_epoch"]) == QUICK.epochs
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", MODEL]


def test_options_beside_a_recipe_are_refused(tmp_path, images, tiny):
    with pytest.raises(SdaError, match="go with a recipe's name: set them in the Recipe"):
        finetune(images, tmp_path / "out", tiny.resnet, QUICK, stop_after=1)
    assert not (tmp_path / "out").exists()


def test_reading_processes_change_nothing(tmp_path, images, tiny):
    recipe = replace(QUICK, augment="randaugment", drop_path=0.5)
    finetune(images, tmp_path / "none", tiny.convnext, recipe)
    finetune(images, tmp_path / "one", tiny.convnext, recipe, workers=1)
    assert (tmp_path / "one" / MODEL).read_bytes() == (tmp_path / "none" / MODEL).read_bytes()


def test_options_of_a_recipe(tmp_path, images, tiny):
    """Two of 15 epochs, as the first two of all; the file says nothing of stochastic depth, which is for training."""
    options = {"micro_batch": 3, "drop_path": 0.2}
    result = finetune(images, tmp_path / "two", tiny.convnext, "photos", stop_after=2, **options)
    assert result["epochs"] == 2
    finetune(images, tmp_path / "all", tiny.convnext, "photos", **options)
    losses = [json.loads((tmp_path / name / "manifest.json").read_text())["finished"] for name in ("two", "all")]
    assert losses[0]["loss_per_epoch"] == losses[1]["loss_per_epoch"][:2]
    assert load_classifier(tmp_path / "two" / MODEL).config == load_classifier(tiny.convnext).config
    manifest = json.loads((tmp_path / "two" / "manifest.json").read_text())
    chosen = {"micro_batch": 3, "drop_path": 0.2, "stop_after": 2}
    assert manifest["settings"]["recipe"] == manifest["settings"]["recipe"] | chosen
    with pytest.raises(SdaError, match=r"made with recipe\.drop_path = 0\.2, this run has recipe\.drop_path = 0\.3"):
        finetune(images, tmp_path / "two", tiny.convnext, "photos", stop_after=2, micro_batch=3, drop_path=0.3)


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
    alone = write_images(tmp_path / "alone", ["ant/1.png"])
    with pytest.raises(SdaError, match="holds a single image"):
        finetune(alone, tmp_path / "out", tiny.resnet, QUICK)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("size", [(16, 16), (24, 20)])
def test_augmented_images_are_images(name, size):
    names = [f"ant/{i}.png" for i in range(40)]
    augment = make_augmentation(RECIPES[name], 16, names, [size] * 40)
    image = np.random.default_rng(0).integers(256, size=(*size, 3), dtype=np.uint8)

    def draw(epoch, seed=0):
        return torch.stack([augment(image, drawn) for drawn in map(augment.draws(seed, epoch), range(40))])

    x = draw(0)
    assert x.shape == (40, 16, 16, 3)
    assert x.dtype == torch.uint8
    assert x.float().std() > 30
    assert len({part.numpy().tobytes() for part in x}) > 20
    assert torch.equal(x, draw(0))
    assert not torch.equal(x, draw(1))
    assert not torch.equal(x, draw(0, seed=1))


@pytest.mark.parametrize("name", ["code-resnet", "code-transformer"])
def test_what_an_image_is_shown_as_is_its_own(name):
    """The same whatever other images there are, and whatever was drawn before."""
    image = np.random.default_rng(0).integers(256, size=(24, 24, 3), dtype=np.uint8)
    few = make_augmentation(RECIPES[name], 16, ["ant/1.png"], [(24, 24)])
    many = make_augmentation(RECIPES[name], 16, ["ant/0.png", "ant/1.png"], [(24, 24)] * 2)
    alone, beside = few.draws(3, 7)(0), many.draws(3, 7)(1)
    expected = few(image, alone)
    many(image, many.draws(3, 7)(0))
    assert torch.equal(many(image, beside), expected)
    again = pickle.loads(pickle.dumps(few))  # as reading processes get it
    assert torch.equal(again(image, alone), expected)


def test_the_testbed_draws_as_ever():
    """Position and mirror from one generator, in the order of the epoch: the figures of docs/testbed.md are made so."""
    shapes = [(16, 16), (20, 24), (16, 18)]
    sequence = np.random.SeedSequence([5, 2])
    generator = random.Random(int(sequence.generate_state(3)[0]))
    expected = {}
    for i in np.random.Generator(np.random.PCG64(sequence)).permutation(3):
        height, width = shapes[i]
        y = generator.randrange(height + 4 - 16 + 1)
        expected[int(i)] = (y, generator.randrange(width + 4 - 16 + 1), generator.random() < 0.5)
    augment = make_augmentation(RECIPES["photos"], 16, ["a", "b", "c"], shapes)
    assert {i: augment.draws(5, 2)(i) for i in range(3)} == expected
    image = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    shifted = augment(image, (2, 3, False)).numpy()
    assert (shifted[:, :15] == image[:, 1:]).all()
    assert (shifted[:, 15] == image[:, 14]).all()  # reflected
    assert (augment(image, (2, 3, True)).numpy() == shifted[:, ::-1]).all()


def test_an_augmentation_that_changes_little_keeps_the_levels():
    """Black stays black and white white, whatever the classifier's own normalisation."""
    for recipe in (RECIPES["paper-resnet"], RECIPES["photos"]):
        augment = make_augmentation(recipe, 16, ["ant/1.png"], [(16, 16)])
        for level in (0, 127, 255):
            x = augment(np.full((16, 16, 3), level, np.uint8), augment.draws(0, 0)(0))
            assert set(x.flatten().tolist()) == {level}


def test_images_smaller_than_the_model_are_refused(tmp_path, tiny, write_images):
    small = write_images(tmp_path / "small", ["ant/1.png", "ant/2.png"], size=(20, 10))
    with pytest.raises(SdaError, match="images of 20x10 are smaller than the classifier's 16x16"):
        finetune(small, tmp_path / "out", tiny.resnet, QUICK)


def test_a_loss_that_explodes_is_reported(tmp_path, images, tiny):
    with pytest.raises(SdaError, match=r"training came to a loss of (nan|inf) in epoch \d: check the images and the"):
        finetune(images, tmp_path / "out", tiny.resnet, replace(QUICK, lr=1e30, warmup_epochs=0, clip_norm=None))


def test_weights_that_explode_in_the_last_step_are_not_kept(tmp_path, images, tiny):
    """The loss of an epoch is from before its last step, so it alone would not tell."""
    recipe = Recipe("sgd", 3e38, 1e3, 64, 1, "step")
    with pytest.raises(SdaError, match="training came to weights that are no finite numbers in epoch 1: check the"):
        finetune(images, tmp_path / "out", tiny.resnet, recipe)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_negative_seed_is_refused(tmp_path, images, tiny):
    with pytest.raises(SdaError, match="--seed -1 is out of range"):
        finetune(images, tmp_path / "out", tiny.resnet, QUICK, seed=-1)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_does_not_suffice(tmp_path, images, tiny, monkeypatch, error):
    def too_much(*_):
        raise error

    monkeypatch.setattr(training, "part_loss", too_much)
    with pytest.raises(SdaError, match="does not hold the training of 4 images at once: give a smaller --micro-batch"):
        finetune(images, tmp_path / "out", tiny.resnet, QUICK)


@pytest.mark.parametrize("where", ["step", "load_state_dict"])
def test_memory_that_does_not_hold_the_optimizer(tmp_path, images, tiny, monkeypatch, where):
    """Fewer images at once would not help: its moments are as large as the model, when they are made and read again."""

    def interrupt(recipe, step, steps_per_epoch):
        if step == 2:
            raise KeyboardInterrupt
        return 1e-3

    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    if where == "load_state_dict":
        with monkeypatch.context() as patch:
            patch.setattr(training, "learning_rate", interrupt)
            with pytest.raises(KeyboardInterrupt):
                finetune(images, tmp_path / "out", tiny.resnet, QUICK)
    monkeypatch.setattr(torch.optim.AdamW, where, too_much)
    with pytest.raises(SdaError, match="does not hold the gradients and the optimizer's state of this model: use"):
        finetune(images, tmp_path / "out", tiny.resnet, QUICK)


def test_a_file_that_vanishes_while_training(tmp_path, images, tiny, monkeypatch):
    def vanish(recipe, step, steps_per_epoch):
        (images / "bee" / "1.png").unlink(missing_ok=True)
        return 1e-3

    monkeypatch.setattr(training, "learning_rate", vanish)
    with pytest.raises(SdaError, match=r"bee/1\.png cannot be read .*: replace or remove it"):
        finetune(images, tmp_path / "out", tiny.resnet, QUICK)


def test_a_reading_process_that_dies(tmp_path, images, tiny, monkeypatch):
    def killed(*_, **__):
        yield from ()
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr(loading, "DataLoader", killed)
    with pytest.raises(SdaError, match="a process that reads images died, perhaps for lack of memory: run the same"):
        finetune(images, tmp_path / "out", tiny.resnet, QUICK, workers=1)
