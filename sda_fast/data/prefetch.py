"""Reads the next batches while the network runs on this one."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Calls `read` for the batches to come in a thread, at most `depth` of them ahead.

    Called with a batch, it returns what `read(batch)` returns, or raises what that raises. The order of `batches` says
    which to read next; one that is asked for out of turn is read then, so the result never depends on it.
    """

    def __init__(self, read: Callable[[list[str]], T], batches: Iterable[list[str]], depth: int = 2) -> None:
        self._read = read
        self._rest = iter(batches)
        self._depth = depth
        self._waiting: dict[tuple[str, ...], Future[T]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._fill()

    def __call__(self, batch: list[str]) -> T:
        future = self._waiting.pop(tuple(batch), None)
        self._fill()
        return (future or self._thread.submit(self._read, batch)).result()

    def _fill(self) -> None:
        while len(self._waiting) < self._depth:
            batch = next(self._rest, None)
            if batch is None:
                return
            self._waiting[tuple(batch)] = self._thread.submit(self._read, batch)
