"""Fine-tuning recipes: those of the paper (table 7) and the testbed's."""

from dataclasses import dataclass
from typing import Literal

from sda_fast.errors import SdaError


@dataclass(frozen=True)
class Recipe:
    """Everything that changes a fine-tuning run beside data and seed.

    optimizer "sgd" (momentum 0.9) or "adamw"; lr the peak rate; schedule "step" (tenth at each of `milestones`,
    epochs) or "cosine" (per epoch, to 0.01 lr, after a per-step linear warm-up of `warmup_epochs`); clip_norm: largest
    gradient norm; augment "crop-flip" (random resized crop, mirror), "randaugment" (the same, then RandAugment
    rand-m9-mstd0.5-inc1 and random erasing with probability 0.25) or "shift-flip" (reflected shifts of an
    eighth and mirror, for small patches).
    """

    optimizer: Literal["sgd", "adamw"]
    lr: float
    weight_decay: float
    batch_size: int
    epochs: int
    schedule: Literal["step", "cosine"]
    milestones: tuple[int, ...] = ()
    warmup_epochs: int = 0
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    augment: Literal["crop-flip", "randaugment", "shift-flip"] = "crop-flip"


RECIPES = {
    # Paper, table 7, and the published configuration for what the table leaves out (augmentation, loss, clipping).
    "resnet": Recipe("sgd", 5e-4, 1e-4, 512, 15, "step", milestones=(10,)),
    "transformer": Recipe(
        "adamw",
        2e-5,
        1e-8,
        1024,
        15,
        "cosine",
        warmup_epochs=5,
        clip_norm=5.0,
        label_smoothing=0.1,
        augment="randaugment",
    ),
    # 32x32 patches and small models: small batches, a rate low enough to move the model to the synthetic domain
    # without unlearning its classes. Labels are smoothed as in the source models' training, so that both are
    # calibrated alike.
    "photos": Recipe(
        "adamw",
        1e-4,
        0.05,
        64,
        15,
        "cosine",
        warmup_epochs=1,
        clip_norm=5.0,
        label_smoothing=0.1,
        augment="shift-flip",
    ),
}


def recipe_for(name: str | None, architecture: str) -> Recipe:
    """The recipe of that name; without one, "resnet" for ResNets and "transformer" (Swin, ConvNeXt) for others.

    Raises SdaError for an unknown name.
    """
    if name is None:
        name = "resnet" if "resnet" in architecture or "resnext" in architecture else "transformer"
    if name not in RECIPES:
        raise SdaError(f"recipe {name!r} is not known; choose from {', '.join(RECIPES)}")
    return RECIPES[name]
