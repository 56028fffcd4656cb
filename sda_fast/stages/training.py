"""The training loop of the stage "finetune", in one process or several: which of them computes a part of a batch does
not matter, because every part draws, normalises and counts by itself."""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from sda_fast.data import ImageFile, to_unit
from sda_fast.engines.batch_size import is_out_of_memory
from sda_fast.errors import SdaError
from sda_fast.files import write_bytes
from sda_fast.models import Classifier
from sda_fast.numerics import deterministic
from sda_fast.stages.augment import Augmentation
from sda_fast.stages.epochs import epoch_parts
from sda_fast.stages.loading import Item, Loaded, TrainingImages, load
from sda_fast.stages.manifest import Output
from sda_fast.stages.optimization import learning_rate, make_optimizer, part_loss
from sda_fast.stages.progress import progress
from sda_fast.stages.ranks import Ranks, ranks
from sda_fast.stages.recipes import Recipe

STATE = ".resume.pt"
# What needs memory whatever the number of images at once.
_UPDATE = ("the gradients and the optimizer's state of this model", "use a device with more memory")


def train(
    classifier: Classifier,
    files: Sequence[ImageFile],
    labels: Sequence[int],
    augment: Augmentation,
    recipe: Recipe,
    seed: int,
    out: Output,
    workers: int,
    quiet: bool | None,
) -> list[float]:
    """Fine-tune the classifier where it lies; returns the mean loss of every epoch.

    The first process writes the state after each epoch, from which a later call goes on. Raises SdaError for a loss
    that is not finite, memory that does not suffice, and a file that can no longer be read.
    """
    others = ranks()
    device = classifier.mean.device
    classifier.requires_grad_(True).train()
    optimizer = make_optimizer(classifier, recipe)
    losses = _restore(out, classifier, optimizer, others)
    epochs, name = range(len(losses), recipe.last_epoch), f"fine-tuning {classifier.config['architecture']}"
    with ExitStack() as stack:
        stack.enter_context(deterministic(device, warn_only=True))
        if others is not None:
            stack.enter_context(others.collectives(device.type))
        hidden = quiet or (others is not None and not others.first)
        reporter = stack.enter_context(
            progress(recipe.last_epoch * len(files), name, hidden, done=len(losses) * len(files))
        )
        items = _items(len(files), augment, recipe, seed, epochs, others)
        images = TrainingImages(files, labels, augment)
        loaded = stack.enter_context(closing(load(images, items, workers, pin=device.type == "cuda")))
        for epoch in epochs:
            total = torch.zeros((), dtype=torch.float64, device=device)
            steps = epoch_parts(len(files), recipe, seed, epoch)
            for step, parts in enumerate(steps):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(recipe, epoch * len(steps) + step, len(steps))
                optimizer.zero_grad(set_to_none=True)
                total += _gradient(classifier, parts, loaded, recipe, [seed, epoch, step], others)
                with _memory_for(*_UPDATE):  # the optimizer makes its moments in the first step
                    if recipe.clip_norm is not None:
                        nn.utils.clip_grad_norm_(classifier.parameters(), recipe.clip_norm)
                    optimizer.step()
                reporter.advance(sum(map(len, parts)))
            losses.append(_mean_loss(total, len(files), epoch, others))
            if not all(parameter.isfinite().all() for parameter in classifier.parameters()):
                raise _diverged("weights that are no finite numbers", epoch)
            if others is None or others.first:
                _save(out, classifier, optimizer, losses)
    classifier.eval()
    return losses


def _items(
    images: int, augment: Augmentation, recipe: Recipe, seed: int, epochs: range, others: Ranks | None
) -> Iterator[list[Item]]:
    """What this process reads, part by part."""
    for epoch in epochs:
        draw = augment.draws(seed, epoch)
        for parts in epoch_parts(images, recipe, seed, epoch):
            for _, part in _mine(parts, others):
                yield [(i, draw(i)) for i in part.tolist()]


def _mine(parts: Sequence[np.ndarray], others: Ranks | None) -> list[tuple[int, np.ndarray]]:
    """The parts of a batch that fall to this process, with their numbers."""
    numbered = list(enumerate(parts))
    return numbered if others is None else numbered[others.rank :: others.size]


def _gradient(
    classifier: Classifier,
    parts: Sequence[np.ndarray],
    loaded: Iterator[Loaded],
    recipe: Recipe,
    draw: list[int],
    others: Ranks | None,
) -> Tensor:
    """Leave the gradient of the batch's mean loss in the parameters; returns the sum of this process's losses."""
    device = classifier.mean.device
    images = sum(map(len, parts))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for number, part in _mine(parts, others):
        batch = next(loaded)
        # Stochastic depth and dropout draw from torch's generator of the device.
        torch.manual_seed(int(np.random.SeedSequence([*draw, number]).generate_state(1, np.uint64)[0]))
        fewer = "give a smaller --micro-batch (without BatchNorm and stochastic depth, the model is the same)"
        with _memory_for(f"the training of {len(part)} images at once", f"{fewer} and another --output"):
            x, y = (t.to(device, non_blocking=True) for t in batch)
            with _running_statistics(classifier, moving=number == 0):
                loss = part_loss(classifier(to_unit(x)), y, recipe)
            (loss * (len(part) / images)).backward()
        total += loss.detach().double() * len(part)
    if others is not None:
        with _memory_for(*_UPDATE):
            _sum_gradients(list(classifier.parameters()))
    return total


@contextmanager
def _memory_for(what: str, way_out: str) -> Iterator[None]:
    """Inside the block, memory that runs out raises SdaError: what the device does not hold, and the way out."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise SdaError(f"the device's memory does not hold {what}: {way_out}") from error


@contextmanager
def _running_statistics(module: nn.Module, moving: bool) -> Iterator[None]:
    """Inside the block, BatchNorm's running statistics move or stay; it normalises by the batch in either case.

    Of the original's processes each has statistics of its own, and those of the first are saved.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = moving
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Every process's gradients become the sum over all; one that had no part adds zeros."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = gradient.view_as(parameter)


def _mean_loss(total: Tensor, images: int, epoch: int, others: Ranks | None) -> float:
    sums = [total.item()] if others is None else others.gather(total.item())
    loss = round(sum(sums) / images, 5)
    if not math.isfinite(loss):
        raise _diverged(f"a loss of {loss}", epoch)
    return loss


def _diverged(what: str, epoch: int) -> SdaError:
    way_out = "check the images and the source model, or give another --recipe and another --output"
    return SdaError(f"training came to {what} in epoch {epoch + 1}: {way_out}")


def _save(out: Output, module: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
    buffer = io.BytesIO()
    torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}, buffer)
    write_bytes(buffer.getvalue(), out.folder / STATE)


def _restore(out: Output, module: nn.Module, optimizer: torch.optim.Optimizer, others: Ranks | None) -> list[float]:
    """The losses of the epochs that are done, with weights and optimizer as after the last of them."""
    path = out.folder / STATE
    losses: list[float] = []
    if path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict(state["model"])
        with _memory_for(*_UPDATE):
            optimizer.load_state_dict(state["optimizer"])
        losses = list(state["losses"])
    if others is not None and len(set(map(len, others.gather(losses)))) > 1:
        raise SdaError(f"the processes do not see the same {path}: give a folder that all machines share")
    return losses
