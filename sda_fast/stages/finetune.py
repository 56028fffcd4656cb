"""Stage "finetune": adapt a classifier to the aligned synthetic images; the second half of SDA's first stage."""

import hashlib
import io
import math
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sda_fast.data import ImageFile, label_indices, list_images, read_image, shown, to_unit
from sda_fast.errors import SdaError
from sda_fast.files import write_bytes
from sda_fast.models import Classifier, load_classifier, save_checkpoint
from sda_fast.models.checkpoints import read_checkpoint
from sda_fast.stages.manifest import Output, file_sha256, open_output
from sda_fast.stages.progress import progress
from sda_fast.stages.ranks import alone
from sda_fast.stages.recipes import Recipe, recipe_for

MODEL = "model.safetensors"
_STATE = ".resume.pt"
Augment = Callable[[np.ndarray], Tensor]  # uint8 [H, W, 3] -> float32 [3, S, S] in [-1, 1]


def finetune(
    input: str | Path,
    output: str | Path,
    model: str | Path,
    recipe: str | Recipe | None = None,
    *,
    seed: int = 0,
    device: str = "cpu",
    quiet: bool | None = None,
) -> dict[str, Any]:
    """Fine-tune a classifier on the labelled images below `input` (`.../<class>/<file>`); returns a summary.

    Writes `<output>/model.safetensors`, a file of this package. BatchNorm statistics move with the data, as in the
    original. Resumes after the last whole epoch, with the very result of a run that was not interrupted.
    Raises SdaError for unknown class folders, wrong weights and other settings than those of a run begun before.
    """
    alone("finetune")
    if seed < 0:
        raise SdaError(f"--seed {seed} is out of range: give at least 0")
    files = list_images(input)
    if len(files) < 2:
        raise SdaError(f"--input {input} holds a single image: fine-tuning needs at least two")
    classifier = load_classifier(model)
    labels = label_indices(files, classifier.classes)
    if not isinstance(recipe, Recipe):
        recipe = recipe_for(recipe, classifier.config["architecture"])
    settings = {
        "recipe": asdict(recipe),
        "seed": seed,
        "images": len(files),
        "weights": {"model": file_sha256(model)},
        "data": _content_hash(files),
    }
    out = open_output(output, "finetune", settings)
    target = out.folder / MODEL
    summary = {"images": len(files), "epochs": recipe.epochs, "output": str(target)}
    if target.exists():
        return summary

    images = _read_all(files)
    losses = _train(classifier.to(device), images, torch.tensor(labels), recipe, seed, out, quiet)
    _, metadata = read_checkpoint(model)
    metadata = metadata or {"kind": "classifier", "config": classifier.config}  # the file is another library's
    save_checkpoint(target, classifier.cpu(), metadata)
    (out.folder / _STATE).unlink(missing_ok=True)
    out.finish({**summary, "loss_per_epoch": losses})
    return {**summary, "loss": losses[-1]}


def _content_hash(files: list[ImageFile]) -> str:
    """One hash of all names, which hold the labels, and contents."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file_sha256(file.path)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _read_all(files: list[ImageFile]) -> list[np.ndarray]:
    """Every image, uint8 [H, W, 3]. Raises SdaError naming all that cannot be read: without them the model differs."""
    images: list[np.ndarray] = []
    bad: dict[str, SdaError] = {}
    for file in files:
        try:
            images.append(read_image(file.path))
        except SdaError as error:
            bad[shown(file.name)] = error
    if bad:
        first, *others = bad
        also = f" (so are {len(others)} others: {', '.join(others)})" if others else ""
        raise SdaError(f"{str(bad[first]).removesuffix('.')}{also}.") from bad[first]
    return images


def _train(
    classifier: Classifier,
    images: list[np.ndarray],
    labels: Tensor,
    recipe: Recipe,
    seed: int,
    out: Output,
    quiet: bool | None,
) -> list[float]:
    device = classifier.mean.device
    augment = make_augment(recipe, classifier.input_size)
    classifier.requires_grad_(True).train()
    optimizer = make_optimizer(classifier, recipe)
    batches = _batches(len(images), recipe.batch_size)
    losses = _restore(out, classifier, optimizer)
    name = f"fine-tuning {classifier.config['architecture']}"
    with progress(recipe.epochs * len(images), name, quiet, done=len(losses) * len(images)) as reporter:
        for epoch in range(len(losses), recipe.epochs):
            order = _seed_everything(seed, epoch).permutation(len(images))
            total = 0.0
            for step, batch in enumerate(batches):
                chosen = order[batch]
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(recipe, epoch + step / len(batches))
                x = torch.stack([augment(images[i]) for i in chosen]).to(device)
                y = labels[torch.from_numpy(chosen)].to(device)
                loss = nn.functional.cross_entropy(classifier(x), y, label_smoothing=recipe.label_smoothing)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if recipe.clip_norm is not None:
                    nn.utils.clip_grad_norm_(classifier.parameters(), recipe.clip_norm)
                optimizer.step()
                total += loss.item() * len(chosen)
                reporter.advance(len(chosen))
            losses.append(round(total / len(images), 5))
            if not math.isfinite(losses[-1]):
                raise SdaError(f"the loss became {losses[-1]} in epoch {epoch + 1}: lower the learning rate")
            _save(out, classifier, optimizer, losses)
    classifier.eval()
    return losses


def _batches(images: int, size: int) -> list[slice]:
    """The parts of an epoch. A last one of a single image joins the one before: BatchNorm cannot normalise it."""
    starts = list(range(0, images, size))
    if len(starts) > 1 and images - starts[-1] == 1:
        starts.pop()
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], images], strict=True)]


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """The rate at a point in time, in epochs: the warm-up moves with every step, the decay once per epoch."""
    if epoch < recipe.warmup_epochs:
        return recipe.lr * max(epoch / recipe.warmup_epochs, 1e-8)
    whole = math.floor(epoch)
    if recipe.schedule == "step":
        return recipe.lr * 0.1 ** sum(whole >= milestone for milestone in recipe.milestones)
    span = max(1, recipe.epochs - recipe.warmup_epochs)
    return recipe.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (whole - recipe.warmup_epochs) / span)))


def make_optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer; AdamW does not decay biases, norms and other one-dimensional parameters."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(module.parameters(), recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)
    no_decay = ("relative_position_bias_table", "absolute_pos_embed")
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        exempt = parameter.ndim < 2 or name.endswith(no_decay)
        (plain if exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, recipe.lr, betas=(0.9, 0.999))


def make_augment(recipe: Recipe, size: int) -> Augment:
    """uint8 [H, W, 3] -> float32 [3, size, size] in [-1, 1], drawing from Python's, numpy's and torch's generators."""
    if recipe.augment == "shift-flip":
        return lambda image: _shift_flip(image, size)
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.data.transforms_factory import transforms_imagenet_train

    randaugment = recipe.augment == "randaugment"
    # The grey that RandAugment fills with and the noise that erases are ImageNet's, as in the original, whatever
    # the classifier normalises with.
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    transform = transforms_imagenet_train(
        size,
        interpolation="bicubic" if randaugment else "bilinear",
        color_jitter=(0.0, 0.0, 0.0),
        auto_augment="rand-m9-mstd0.5-inc1" if randaugment else None,
        re_prob=0.25 if randaugment else 0.0,
        re_mode="pixel",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
    )
    return lambda image: (2 * (transform(Image.fromarray(image)) * std + mean) - 1).clamp(-1, 1)


def _shift_flip(image: np.ndarray, size: int) -> Tensor:
    margin = size // 8
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="reflect")
    if min(padded.shape[:2]) < size:
        height, width = image.shape[:2]
        raise SdaError(f"images of {width}x{height} are smaller than the classifier's {size}x{size}: resize them")
    y, x = (random.randrange(side - size + 1) for side in padded.shape[:2])
    crop = padded[y : y + size, x : x + size]
    return to_unit(crop[:, ::-1] if random.random() < 0.5 else crop)[0]


def _seed_everything(seed: int, epoch: int) -> np.random.Generator:
    """Seed all global generators for an epoch, so that a resumed run draws what an uninterrupted one would."""
    sequence = np.random.SeedSequence([seed, epoch])
    low, middle, high = (int(value) for value in sequence.generate_state(3))
    random.seed(low)
    np.random.seed(middle)
    torch.manual_seed(high)
    return np.random.Generator(np.random.PCG64(sequence))


def _save(out: Output, module: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
    buffer = io.BytesIO()
    torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}, buffer)
    write_bytes(buffer.getvalue(), out.folder / _STATE)


def _restore(out: Output, module: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    path = out.folder / _STATE
    if not path.exists():
        return []
    state = torch.load(path, map_location="cpu", weights_only=True)
    module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return list(state["losses"])
