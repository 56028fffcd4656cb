"""finetune under torchrun: two processes against one, a killed run that goes on, and what is refused."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sda_fast.errors import SdaError
from sda_fast.models.checkpoints import read_checkpoint
from sda_fast.stages import training
from sda_fast.stages.finetune import MODEL, _require_parts, finetune
from sda_fast.stages.optimization import learning_rate
from sda_fast.stages.ranks import Ranks
from sda_fast.stages.recipes import RECIPES, recipe_for

WORK = Path(__file__).with_name("finetune_work.py")
NAMES = [f"{name}/{i}.png" for name in ("ant", "bee", "cow") for i in range(4)][1:]


@pytest.fixture(scope="module")
def work():
    spec = importlib.util.spec_from_file_location("finetune_work", WORK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def interrupt(recipe, step, steps_per_epoch):
    """In the place of `learning_rate`: one epoch of two steps is done."""
    if step == 2:
        raise KeyboardInterrupt
    return learning_rate(recipe, step, steps_per_epoch)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, tiny, write_images, work):
    """The folder that finetune_work.py fills, by two processes; torchrun starts them again after one was killed."""
    folder = tmp_path_factory.mktemp("ranks")
    write_images(folder / "images", NAMES, size=(20, 24))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "learning_rate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            finetune(folder / "images", folder / "begun-by-one", tiny.convnext, work.CONVNEXT)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = [sys.executable, "-P", *torchrun, "--log-dir", folder / "logs", WORK, folder, tiny.resnet, tiny.convnext]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "exitcode: -9" in run.stderr, run.stderr
    assert run.stdout == f"{folder / 'photos' / MODEL}: 15 epochs of 11 images.\n"  # said by the first process alone
    return folder


@pytest.mark.parametrize("name", ["convnext", "begun-by-one", "resnet", "photos"])
def test_two_processes_make_the_model_of_one(tmp_path, two_processes, tiny, work, name):
    """Of LayerNorm, stochastic depth and RandAugment, also if one began; and of BatchNorm, by parts."""
    recipes = {"resnet": work.RESNET, "photos": recipe_for("photos", "", micro_batch=32)}
    model = tiny.resnet if name in recipes else tiny.convnext
    finetune(two_processes / "images", tmp_path / "one", model, recipes.get(name, work.CONVNEXT))
    paths = (tmp_path / "one" / MODEL, two_processes / name / MODEL, model)
    one, two, source = (read_checkpoint(path)[0] for path in paths)
    difference, moved = {}, {}
    for key, expected in one.items():
        largest = expected.double().abs().max()
        difference[key] = ((two[key] - expected.double()).abs().max() / largest).item()
        moved[key] = ((source[key] - expected.double()).abs().max() / largest).item()
    print(f"{name}: weights of two processes and of one differ by {max(difference.values()):.1e}")
    assert max(difference.values()) <= 1e-4
    assert sum(value > 1e-3 for value in moved.values()) > 0.8 * len(moved)


def test_killed_and_started_again(two_processes):
    whole, killed = two_processes / "convnext", two_processes / "killed"
    assert (killed / MODEL).read_bytes() == (whole / MODEL).read_bytes()
    assert sorted(path.name for path in killed.iterdir()) == ["manifest.json", MODEL]


def test_more_processes_than_parts_are_refused():
    for recipe, processes, message in (
        (RECIPES["photos"], 2, "a batch of 64 has 1 part, too few for 2 processes: start fewer, or give a smaller"),
        (RECIPES["code-resnet"], 9, "a batch of 512 has 8 parts, too few for 9 processes"),
    ):
        with pytest.raises(SdaError, match=message):
            _require_parts(recipe, Ranks(None, 0, processes))
    _require_parts(recipe_for("photos", "resnet18", micro_batch=32), Ranks(None, 0, 2))
    _require_parts(RECIPES["code-resnet"], Ranks(None, 0, 3))
