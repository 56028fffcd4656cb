"""Which images a step of fine-tuning sees, in which parts: functions of seed and epoch, not of the processes.

A step's batch is divided into parts. Every part goes through the network by itself, on one process or another, and the
gradients of all are summed.
"""

import numpy as np

from sda_fast.stages.recipes import Recipe

Parts = list[np.ndarray]  # of one batch; each holds positions of images, int64


def epoch_seeds(seed: int, epoch: int) -> np.random.SeedSequence:
    """From which all that an epoch draws is derived, so that a resumed run draws what an uninterrupted one would."""
    return np.random.SeedSequence([seed, epoch])


def epoch_order(images: int, seed: int, epoch: int) -> np.ndarray:
    """All positions 0 ... images - 1, int64, in the order of that epoch."""
    return np.random.Generator(np.random.PCG64(epoch_seeds(seed, epoch))).permutation(images)


def epoch_parts(images: int, recipe: Recipe, seed: int, epoch: int) -> list[Parts]:
    """The parts of every batch of an epoch: no image is left out, none is seen twice."""
    order = epoch_order(images, seed, epoch)
    return [divide(order[batch], recipe.parts) for batch in batches(images, recipe.batch_size)]


def batches(images: int, size: int) -> list[slice]:
    """The batches of an epoch. A last one of a single image joins the one before: BatchNorm cannot normalise it."""
    starts = list(range(0, images, size))
    if len(starts) > 1 and images - starts[-1] == 1:
        starts.pop()
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], images], strict=True)]


def divide(batch: np.ndarray, parts: int) -> Parts:
    """A batch in as many parts, as even as can be; in fewer where one would hold a single image."""
    return np.array_split(batch, max(1, min(parts, len(batch) // 2)))
