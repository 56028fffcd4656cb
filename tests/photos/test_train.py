import json

import pytest
import torch

from sda_fast.data import to_unit
from sda_fast.errors import SdaError
from sda_fast.models import load_adm, load_classifier, load_dit
from sda_fast.models.checkpoints import read_checkpoint
from sda_fast.photos.dataset import CLASSES, SIZE, held_out_patches
from sda_fast.photos.train import LABEL_SMOOTHING, MODELS, STEPS, train_model
from sda_fast.stages.recipes import RECIPES
from sda_fast.weights import SHIPPED, weights_path


def load(name, path):
    return {"adm": load_adm, "dit": load_dit}.get(name, load_classifier)(path)


def output(name, model, x):
    t = torch.full((len(x),), 500)
    if name == "dit":
        return model(x, t, torch.arange(len(x)))
    return model(x, t) if name == "adm" else model(x)


@pytest.mark.parametrize("name", MODELS)
def test_two_steps_leave_a_checkpoint_and_its_record(tmp_path, name):
    lines = []
    path = train_model(name, tmp_path / "new", steps=2, batch=4, seed=3, log=lines.append)
    assert path == tmp_path / "new" / f"{name}.safetensors"
    model = load(name, path)
    x = to_unit(held_out_patches(CLASSES[0], 2))
    assert output(name, model, x).isfinite().all()
    state, _ = read_checkpoint(path)
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.float16}
    if name != "adm":
        assert tuple(model.classes) == CLASSES

    record = json.loads(path.with_suffix(".json").read_text())
    assert record.items() >= {"model": name, "steps": 2, "batch": 4, "seed": 3, "device": "cpu"}.items()
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert record["seconds"] >= 0
    ((step, loss),) = record["loss_every_100_steps"]
    assert (step, loss) == (2, pytest.approx(loss))
    assert len(lines) == 1
    assert lines[0].startswith(f"{name}: step 2/2  loss ")


def test_the_seed_decides(tmp_path):
    runs = {"a": 0, "b": 0, "c": 1}
    a, b, c = (
        train_model("convnext", tmp_path / name, steps=2, batch=4, seed=seed, log=lambda _: None).read_bytes()
        for name, seed in runs.items()
    )
    assert a == b
    assert a != c


def test_an_output_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SdaError, match=r"--output .*file cannot be used"):
        train_model("adm", tmp_path / "file", steps=10**9)
    with pytest.raises(SdaError, match="--steps 0 is out of range"):
        train_model("adm", tmp_path / "new", steps=0)


def test_source_and_fine_tuned_models_are_calibrated_alike():
    assert LABEL_SMOOTHING == RECIPES["photos"].label_smoothing > 0


@pytest.mark.parametrize("name", MODELS)
def test_shipped_models(name):
    """What is shipped was made by the command, and sees something: better than chance without being told."""
    model = load(name, weights_path(f"photos:{name}"))
    record = json.loads((SHIPPED / f"{name}.json").read_text())
    assert record["model"] == name
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert record["steps"] >= min(STEPS.values())
    losses = [loss for _, loss in record["loss_every_100_steps"]]
    assert losses[-1] < losses[0]
    x = torch.cat([to_unit(held_out_patches(label, 4)) for label in CLASSES])
    assert x.shape[-1] == SIZE
    if name in ("resnet", "convnext"):
        labels = torch.arange(len(CLASSES)).repeat_interleave(4)
        assert (model(x).argmax(1) == labels).float().mean() > 0.5
    else:
        assert output(name, model, x[: len(CLASSES)]).isfinite().all()


def test_shipped_weights_are_small():
    sizes = [file.stat().st_size for file in SHIPPED.glob("*.safetensors")]
    assert len(sizes) == len(MODELS)
    assert sum(sizes) <= 10e6
