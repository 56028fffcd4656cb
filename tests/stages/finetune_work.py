"""What test_finetune_ranks.py lets torchrun start: fine-tunings in one folder, one of which is killed the first time.

python finetune_work.py FOLDER RESNET CONVNEXT, with images in FOLDER/images.
"""

import os
import signal
import sys
from pathlib import Path

from sda_fast.cli import app
from sda_fast.stages import training
from sda_fast.stages.finetune import finetune
from sda_fast.stages.optimization import learning_rate
from sda_fast.stages.recipes import Recipe

COMMON = {"warmup_epochs": 1, "warmup_start": 1e-3, "clip_norm": 5.0, "label_smoothing": 0.1, "micro_batch": 2}
# 11 images in batches of 6 and 5, of three parts and two.
CONVNEXT = Recipe("adamw", 1e-3, 0.05, 6, 3, "cosine", augment="randaugment", drop_path=0.3, **COMMON)
RESNET = Recipe("sgd", 5e-2, 1e-4, 6, 3, "step", milestones=(2,), augment="crop-flip", **COMMON)


def killed(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The second process is killed in the second step of the second epoch, when torchrun starts it first."""
    if step == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return learning_rate(recipe, step, steps_per_epoch)


def main(folder: Path, resnet: str, convnext: str) -> None:
    finetune(folder / "images", folder / "begun-by-one", convnext, CONVNEXT)
    finetune(folder / "images", folder / "resnet", resnet, RESNET)
    finetune(folder / "images", folder / "convnext", convnext, CONVNEXT)
    training.learning_rate = killed
    finetune(folder / "images", folder / "killed", convnext, CONVNEXT)
    options = ["--model", resnet, "--recipe", "photos", "--micro-batch", "32"]
    sys.argv = ["sda-fast", "finetune", "-i", f"{folder}/images", "-o", f"{folder}/photos", *options]
    app.run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
