"""Runs a stage over keyed items in fixed-size batches, in one process or several, skipping what is done."""

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from typing import Any

import torch

from sda_fast.errors import SdaError
from sda_fast.host_memory import keep_freed_memory, release_freed_memory
from sda_fast.stages.progress import progress
from sda_fast.stages.ranks import Ranks, ranks

# Called in the worker: make(*arguments) -> work; work(keys) does one batch and returns what failed in it, if anything:
# by the name of the file at fault, the reason.
Failed = Mapping[str, str] | None
Work = Callable[[list[str]], Failed]

_make: Callable[[], Work] | None = None
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
) -> dict[str, str]:
    """Do every batch with the work that `make(*arguments)` returns; progress counts `total` keys.

    Returns what failed in all of them.

    With several workers, each process calls `make` once and takes batches as it becomes free; `make` and
    `arguments` must be picklable. Under torchrun (`ranks`), the processes share the first one's batches, and all of
    them return what failed in any. Every process, and this one if it works alone, computes with one CPU thread:
    libraries split their sums by the number of threads, which would show in the last bits. An error that the work
    raises stops the run; what is written stays.
    """
    check_workers(workers)
    if (others := ranks()) is not None:
        if workers > 1:
            raise SdaError(f"--workers {workers} and torchrun exclude each other: start more processes instead")
        return _run_as_rank(others, batches, make, arguments, label, total, quiet)
    left = sum(len(batch) for batch in batches)
    steps = _run(batches, make, arguments, min(workers, len(batches)))
    with closing(steps), progress(total, label, quiet, done=max(0, total - left)) as reporter:
        failures: dict[str, str] = {}
        for batch, failed in steps:
            failures.update(failed or {})
            reporter.advance(len(batch))
    return failures


def check_workers(workers: int) -> None:
    """Raises SdaError for a number of processes that is none."""
    if workers < 1:
        raise SdaError(f"--workers {workers} is out of range: give at least 1")


def _run_as_rank(
    others: Ranks,
    batches: Sequence[list[str]],
    make: Callable[..., Work],
    arguments: tuple[Any, ...],
    label: str,
    total: int,
    quiet: bool | None,
) -> dict[str, str]:
    batches = others.share(list(batches))  # the folder may look otherwise to a process that began later
    left, finished = sum(len(batch) for batch in batches), others.total()
    failures: dict[str, str] = {}
    mine = _run(map(batches.__getitem__, others.take(len(batches))), make, arguments, workers=1)
    with closing(mine), progress(total, label, quiet or not others.first, done=max(0, total - left)) as reporter:
        for batch, failed in mine:
            failures.update(failed or {})
            reporter.advance(finished.add(len(batch)) - reporter.worked)
    return {name: reason for part in others.gather(failures) for name, reason in part.items()}


def _run(
    batches: Iterable[list[str]], make: Callable[..., Work], arguments: tuple[Any, ...], workers: int
) -> Generator[tuple[list[str], Failed], None, None]:
    if workers <= 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            work = None
            for batch in batches:
                work = work or make(*arguments)
                yield batch, work(batch)
        finally:
            torch.set_num_threads(threads)
        return
    release_freed_memory()  # what this process used before is the workers'
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _initialise, (make, arguments))
    try:
        with _ctrl_c_ignored():
            futures: dict[Future[Failed], list[str]] = {pool.submit(_do, batch): batch for batch in batches}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except (KeyboardInterrupt, GeneratorExit):
        for process in list((pool._processes or {}).values()):
            process.terminate()  # a batch may take minutes, and nothing is left half written
        raise
    except BrokenProcessPool as error:
        raise SdaError(
            "a worker process died, perhaps for lack of memory: run the same command again to go on, "
            "with fewer --workers or a smaller --batch-size"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Processes that are started inside ignore Ctrl-C, which a terminal sends to them too: ending them is our part."""
    if threading.current_thread() is not threading.main_thread():  # no other thread may change it
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _initialise(make: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
    global _make
    keep_freed_memory()
    torch.set_num_threads(1)
    _make = functools.partial(make, *arguments)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's workers would wait for ever for the batches of a parent that was killed."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _do(batch: list[str]) -> Failed:
    # The work is made here and not in `_initialise`, where an error would break the pool without saying why.
    global _work
    if _work is None:
        assert _make is not None
        _work = _make()
    return _work(batch)
