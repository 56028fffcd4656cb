"""Runs a stage over keyed items in fixed-size batches, in one process or several, skipping what is done."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from sda_fast.errors import SdaError
from sda_fast.stages.progress import progress

# Called in the worker: make(*arguments) -> work; work(keys) does one batch.
Work = Callable[[list[str]], None]

_work: Work | None = None


def plan(groups: Sequence[Sequence[str]], done: Callable[[str], bool], batch_size: int) -> list[list[str]]:
    """Batches of at most `batch_size` keys; a group with anything left to do is kept whole.

    Groups must not be larger than `batch_size`; their order is kept.
    """
    batches: list[list[str]] = []
    for group in groups:
        if all(done(key) for key in group):
            continue
        if not batches or len(batches[-1]) + len(group) > batch_size:
            batches.append([])
        batches[-1].extend(group)
    return batches


def run_batches(
    batches: Sequence[list[str]],
    make: Callable[..., Work],
    arguments: tuple[Any, ...],
    *,
    label: str,
    total: int,
    workers: int = 1,
    quiet: bool | None = None,
) -> None:
    """Do every batch with the work that `make(*arguments)` returns; progress counts `total` keys.

    With several workers, each process calls `make` once and takes batches as it becomes free; `make` and
    `arguments` must be picklable. The first error stops the run; what is written stays.
    """
    if workers < 1:
        raise SdaError(f"--workers {workers} is out of range: give at least 1")
    left = sum(len(batch) for batch in batches)
    with progress(total, label, quiet, done=max(0, total - left)) as reporter:
        for batch in _run(batches, make, arguments, min(workers, len(batches))):
            reporter.advance(len(batch))


def _run(
    batches: Sequence[list[str]], make: Callable[..., Work], arguments: tuple[Any, ...], workers: int
) -> Iterator[list[str]]:
    if workers <= 1:
        work = make(*arguments) if batches else None
        for batch in batches:
            assert work is not None
            work(batch)
            yield batch
        return
    threads = max(1, torch.get_num_threads() // workers)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _initialise, (threads, make, arguments))
    try:
        futures = {pool.submit(_do, batch): batch for batch in batches}
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    except BrokenProcessPool as error:
        raise SdaError(
            "a worker process died, perhaps for lack of memory: run the same command again to go on, "
            "with fewer --workers or a smaller --batch-size"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _initialise(threads: int, make: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
    global _work
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    _work = make(*arguments)


def _do(batch: list[str]) -> None:
    assert _work is not None
    _work(batch)
