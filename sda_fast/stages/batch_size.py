"""The execution batch of a stage: given, chosen by memory, or what an earlier run of the same folder ended with."""

import math
from collections.abc import Callable
from typing import Literal

import torch

from sda_fast.engines.batch_size import affordable_batch
from sda_fast.projector import Projector, Purifier
from sda_fast.sampler import Sampler
from sda_fast.stages.manifest import Output
from sda_fast.stages.ranks import is_first, processes_here, ranks

BatchSize = int | Literal["auto"]


def execution_batch(
    out: Output, asked: BatchSize, make: Callable[[], Projector | Purifier | Sampler], workers: int
) -> int:
    """The batch to begin with, the same in all processes; what memory decided is recorded in the manifest.

    make: what runs the batches, on its device and without a batch size; called for "auto" alone.
    """
    size = _chosen(out, asked, make, workers) if is_first() else 0
    others = ranks()
    return size if others is None else others.share(size)


def record_smaller(out: Output, begun_with: int, used: int | None) -> None:
    """Note that memory ran out, so that a resumed run need not find out again. used: what the last call ended with."""
    if used is not None and used < begun_with and used < out.recorded().get("batch_size", begun_with):
        out.record(batch_size=used)


def _chosen(out: Output, asked: BatchSize, make: Callable[[], Projector | Purifier | Sampler], workers: int) -> int:
    recorded = out.recorded().get("batch_size")
    if recorded is not None:
        return recorded
    if asked != "auto":
        return asked
    run = make()
    step = run.network.step
    sharing = max(1, workers) * processes_here()
    if next(step.parameters()).is_cuda:  # the processes of torchrun are spread over the GPUs
        sharing = max(1, workers) * math.ceil(processes_here() / torch.cuda.device_count())
    most = affordable_batch(step, run.network.engine.name, sharing)
    size = max(1, most // run.batch_unit) * run.batch_unit
    out.record(batch_size=size)
    return size
