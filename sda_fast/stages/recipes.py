"""Fine-tuning recipes: the paper's (table 7), that of the published code, and the testbed's."""

from dataclasses import dataclass, replace
from typing import Literal

from sda_fast.errors import SdaError


@dataclass(frozen=True)
class Recipe:
    """Everything that changes a fine-tuning run beside data and seed.

    optimizer: "sgd" (momentum 0.9, all parameters decayed) or "adamw" (betas 0.9 and 0.999; no decay of biases, norms
    and other one-dimensional parameters, nor of position tables). lr: the peak rate. schedule: "step" (tenth at each
    of `milestones`, in epochs) or "cosine" (once per epoch, to 0.01 lr), after a linear warm-up at every step over
    `warmup_epochs`: from `warmup_start` times lr to lr at its last step, as mmengine counts; None: from nearly nothing
    to lr at the first step after it.

    batch_size: images per step, in parts of at most `micro_batch`; a network pass, and with it BatchNorm, sees a part.
    clip_norm: the largest gradient norm. drop_path: stochastic depth, largest rate of a residual branch; None leaves
    the model as it was built. stop_after: epochs after which to end, without changing the curve.

    augment: "crop-flip" (random resized crop, bilinear without antialiasing as OpenCV's, mirror), "randaugment" (random
    resized crop, bicubic, mirror, RandAugment rand-m9-mstd0.5-inc1, erasing with probability 0.25) or "shift-flip"
    (reflected shifts of an eighth and mirror, for small patches).
    """

    optimizer: Literal["sgd", "adamw"]
    lr: float
    weight_decay: float
    batch_size: int
    epochs: int
    schedule: Literal["step", "cosine"]
    milestones: tuple[int, ...] = ()
    warmup_epochs: int = 0
    warmup_start: float | None = None
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    augment: Literal["crop-flip", "randaugment", "shift-flip"] = "crop-flip"
    micro_batch: int | None = None
    drop_path: float | None = None
    stop_after: int | None = None

    @property
    def last_epoch(self) -> int:
        return self.stop_after or self.epochs

    @property
    def parts(self) -> int:
        """How many parts a whole batch has."""
        return -(-self.batch_size // (self.micro_batch or self.batch_size))


# The published configuration of mmpretrain: parts are what one of its eight GPUs sees, 64 or 128 images.
_RESNET = Recipe("sgd", 5e-4, 1e-4, 512, 30, "step", milestones=(10, 20, 25), micro_batch=64)
_TRANSFORMER = Recipe(
    "adamw",
    2e-5,
    1e-8,
    1024,
    30,
    "cosine",
    warmup_epochs=5,
    warmup_start=2e-8,
    clip_norm=5.0,
    label_smoothing=0.1,
    augment="randaugment",
    micro_batch=128,
)

RECIPES = {
    "code-resnet": _RESNET,
    "code-transformer": _TRANSFORMER,
    # Paper, table 7; what the table leaves out (augmentation, loss, clipping, stochastic depth) is the code's.
    "paper-resnet": replace(_RESNET, epochs=15, milestones=(10,)),
    "paper-transformer": replace(_TRANSFORMER, epochs=15),
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

# What the published configuration fine-tunes with, by timm's name; Swin-B was trained with 0.5.
DROP_PATH = {
    "swin_tiny_patch4_window7_224": 0.2,
    "swin_base_patch4_window7_224": 0.2,
    "convnext_tiny": 0.1,
    "convnext_base": 0.5,
}


def recipe_for(
    name: str | None,
    architecture: str,
    *,
    drop_path: float | None = None,
    micro_batch: int | None = None,
    stop_after: int | None = None,
) -> Recipe:
    """The recipe of that name for a timm model, with what is given in place of its own values.

    "paper" (also without a name) and "code" are a "-resnet" for ResNets and ResNeXts and a "-transformer" (Swin,
    ConvNeXt) for all others; for the paper's Swin and ConvNeXt these say `DROP_PATH`.
    Raises SdaError for an unknown name and values out of range.
    """
    name = name or "paper"
    if name in ("paper", "code"):
        name += "-resnet" if "resnet" in architecture or "resnext" in architecture else "-transformer"
    if name not in RECIPES:
        raise SdaError(f"recipe {name!r} is not known; choose from paper, code, {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    if recipe.drop_path is None and name.endswith("-transformer"):
        drop_path = DROP_PATH.get(architecture.partition(".")[0]) if drop_path is None else drop_path
    if drop_path is not None and not 0 <= drop_path < 1:
        raise SdaError(f"--drop-path {drop_path} is out of range: give at least 0 and less than 1")
    if micro_batch is not None and micro_batch < 2:
        raise SdaError(f"--micro-batch {micro_batch} is out of range: give at least 2")
    if stop_after is not None and not 1 <= stop_after <= recipe.epochs:
        raise SdaError(f"--stop-after {stop_after} is out of range: the recipe has {recipe.epochs} epochs")
    changes = {"drop_path": drop_path, "micro_batch": micro_batch, "stop_after": stop_after}
    return replace(recipe, **{key: value for key, value in changes.items() if value is not None})  # type: ignore[arg-type]
