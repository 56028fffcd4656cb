"""Several processes that torchrun started, on one machine or many: one queue of batches, or one training, for all.

Work is handed out batch by batch, so a slow process takes fewer. What an image becomes depends neither on who computes
it nor on how many there are.
"""

import functools
import itertools
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from sda_fast.errors import SdaError

_PIECE = 4 * 2**20  # bytes; the store refuses values of more than 8 MiB
_PATIENCE = timedelta(days=30)  # torchrun ends all processes when one dies; until then a slow one is waited for
_POLL_SECONDS = 0.05
_GREETING = timedelta(seconds=60)  # torchrun's store is there before the processes: it can only be gone with torchrun


class Ranks:
    """This process, `rank` of `size`. Every method but `first` must be called by all of them, in one order."""

    def __init__(self, store: Any, rank: int, size: int):
        self.size, self.rank, self._store = size, rank, store
        self._calls = itertools.count()

    @property
    def first(self) -> bool:
        """Whether this is the process that reports and that writes what stands once."""
        return self.rank == 0

    def share(self, value: Any) -> Any:
        """The first process's value, which must be JSON-able."""
        key = f"share-{next(self._calls)}"
        if self.first:
            self._set(key, value)
        return self._get(key)

    def gather(self, value: Any) -> list[Any]:
        """All values by rank, when all processes have come here."""
        key = f"gather-{next(self._calls)}"
        self._set(f"{key}-{self.rank}", value)
        return [self._get(f"{key}-{rank}") for rank in range(self.size)]

    def _set(self, key: str, value: Any) -> None:
        text = json.dumps(value).encode()
        pieces = [text[i : i + _PIECE] for i in range(0, len(text), _PIECE)]
        for i, piece in enumerate(pieces):
            self._store.set(f"{key}/{i}", piece)
        self._store.set(key, str(len(pieces)))

    def _get(self, key: str) -> Any:
        pieces = int(self._store.get(key))
        return json.loads(b"".join(self._store.get(f"{key}/{i}") for i in range(pieces)))

    def take(self, count: int) -> Iterator[int]:
        """Those of 0 ... count - 1 that fall to this process: the next one whenever it is ready for it."""
        key = f"take-{next(self._calls)}"
        while (i := self._store.add(key, 1) - 1) < count:
            yield i

    @contextmanager
    def collectives(self, device_type: str) -> Iterator[None]:
        """The collective operations of torch.distributed between all, inside the block: by NCCL on GPUs, else Gloo."""
        import torch.distributed as dist

        store = _part_of(self._store, f"collectives-{next(self._calls)}")
        backend = "nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=_PATIENCE)
        try:
            yield
        finally:
            dist.destroy_process_group()

    def total(self) -> "Total":
        """A number that all processes add to."""
        return Total(self._store, f"total-{next(self._calls)}")


class Total:
    def __init__(self, store: Any, key: str):
        self._store, self._key = store, key

    def add(self, n: int) -> int:
        """The sum so far, `n` included."""
        return self._store.add(self._key, n)


@functools.cache
def ranks() -> Ranks | None:
    """The processes of this run, or None if torchrun started one or none. Raises SdaError if they do not meet."""
    if int(os.environ.get("WORLD_SIZE", 1)) <= 1:
        return None
    from torch.distributed.constants import default_pg_timeout
    from torch.distributed.rendezvous import rendezvous

    timeout = _GREETING if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else default_pg_timeout
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
        store.set_timeout(_PATIENCE)
        run = _meet(store, rank, size)
    except (ValueError, RuntimeError) as error:
        raise SdaError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes do not meet ({str(error).splitlines()[0]}): "
            "start them with torchrun, or unset WORLD_SIZE"
        ) from error
    return Ranks(_part_of(store, f"run-{run}"), rank, size)


def _meet(store: Any, rank: int, size: int) -> int:
    """A number that all processes of this start agree on, and none of an earlier one had, when all have come here.

    torchrun keeps its store when it starts processes again, and what those before left in it must not count. How often
    it did is no such number: each machine counts its own failures, and none when a machine joins or leaves. All
    processes of a start end before the next one, so that none of them still waits here.
    """
    start = store.add(f"starts-{rank}", 1)  # of processes of this rank: another for each, and it never returns
    if rank > 0:
        run = int(store.get(f"run-of-{rank}-{start}"))
        store.set(f"here-{run}-{rank}", "")
        return run
    missing = set(range(1, size))
    while missing:
        # The last start of a rank may still be that of a process that is gone: it will not answer.
        for other in missing:
            store.set(f"run-of-{other}-{store.add(f'starts-{other}', 0)}", str(start))
        time.sleep(_POLL_SECONDS)
        missing = {other for other in missing if not store.check([f"here-{start}-{other}"])}
    return start


def _part_of(store: Any, name: str) -> Any:
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    return PrefixStore(name, store)


def is_first() -> bool:
    """Whether this process reports and writes what stands once: the only one, or the first of all."""
    all_of_them = ranks()
    return all_of_them is None or all_of_them.first


def wait_for_all() -> None:
    """Until every process has come here: torchrun may end the others once one has left."""
    if (others := ranks()) is not None:
        others.gather(None)


def processes_here() -> int:
    """How many processes of this run share this machine's memory and processors."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if ranks() is not None else 1


def alone(command: str) -> None:
    """Raises SdaError if torchrun started several processes, for stages that run in one."""
    if ranks() is not None:
        raise SdaError(f"{command} runs in one process: call it without torchrun")
