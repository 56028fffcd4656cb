"""Whether a result is still that of the files it was made of, which may have been changed in place since."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

from sda_fast.data import source_of
from sda_fast.errors import SdaError
from sda_fast.stages.manifest import Output, file_sha256


class Sources:
    """The files that something is made of, as they are when first asked; `threads` read them."""

    def __init__(self, paths: Sequence[Path], threads: int = 1):
        self.paths, self._threads = paths, threads

    @cached_property
    def sha256(self) -> str:
        """Of one file its SHA-256, of several that of all theirs in order; one that cannot be read counts as such."""
        if self._threads > 1 and len(self.paths) > 1:
            with ThreadPoolExecutor(self._threads) as pool:
                digests = list(pool.map(_sha256, self.paths))
        else:
            digests = [_sha256(path) for path in self.paths]
        return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def made(self, result: Path, recorded: Callable[[], str | None]) -> bool:
        """Whether `result`, made when `sha256` was what is `recorded`, would be made of the same again.

        The files are read only if one of them was written, moved or copied after the result: their times alone cannot
        say then. A result of which nothing is recorded passes only if all of them are older. That a file was changed
        while the result was being made is not noticed.
        """
        return self._changed < os.stat(result).st_mtime_ns or recorded() == self.sha256

    @cached_property
    def _changed(self) -> int:
        return max(map(_changed, self.paths), default=-1)


def made_of_inputs(
    out: Output, sources: Callable[[str], Sequence[Path]], suffix: Callable[[str], str] = lambda key: ".png"
) -> Callable[[str], bool]:
    """The test whether the image of a key is in an output folder, whole, and of its sources as they are now."""

    def done(key: str) -> bool:
        path = out.path(key, suffix(key))
        return out.done(key, suffix(key)) and Sources(sources(key)).made(path, lambda: source_of(path))

    return done


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except SdaError:
        return "unreadable"


def _changed(path: Path) -> int:
    """When a file got its content or its name, in nanoseconds; -1 if it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return -1
    # Unpacking and copying can give a file an old time of writing, but not of its entry in the file system.
    return max(status.st_mtime_ns, status.st_ctime_ns)
