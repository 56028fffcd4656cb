"""Whether a result is still that of the files it was made of, which may have been changed in place since."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

from sda_fast.data import Source, source_of
from sda_fast.errors import SdaError
from sda_fast.stages.manifest import Output, file_sha256

_SECOND = 10**9  # in nanoseconds


class Sources:
    """The files that something is made of, as they are when first asked; `threads` read them."""

    def __init__(self, paths: Sequence[Path], threads: int = 1):
        self.paths, self._threads = paths, threads

    @cached_property
    def mtime_ns(self) -> int:
        """When the file was written, in nanoseconds; of several, the second of the last one and, in place of its
        fraction, a hash of all their times, so that an older file in the place of one shows. -1 if one is not there."""
        try:
            times = [os.stat(path).st_mtime_ns for path in self.paths]
        except OSError:
            return -1
        if len(times) < 2:
            return times[0] if times else -1
        fraction = int.from_bytes(hashlib.sha256(repr(times).encode()).digest()[:8], "big") % _SECOND
        return max(times) // _SECOND * _SECOND + fraction

    @cached_property
    def sha256(self) -> str:
        """Of one file its SHA-256, of several that of all theirs in order; one that cannot be read counts as such."""
        if self._threads > 1 and len(self.paths) > 1:
            with ThreadPoolExecutor(self._threads) as pool:
                digests = list(pool.map(_sha256, self.paths))
        else:
            digests = [_sha256(path) for path in self.paths]
        return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()

    @property
    def now(self) -> Source:
        """What to keep with a result, taken before the files are read: of one changed in between, it is another."""
        mtime_ns = self.mtime_ns  # first, for the same reason
        return Source(self.sha256, mtime_ns)

    def made(self, mtime_ns: int, sha256: Callable[[], str | None]) -> bool:
        """Whether a result of which these are kept would be made of the same again.

        The files are read only if their time is another one. Where no hash was kept, by an earlier version, the result
        passes if `mtime_ns`, its own then, is later than theirs.
        """
        if mtime_ns == self.mtime_ns:
            return True
        kept = sha256()
        return mtime_ns > self.mtime_ns if kept is None else kept == self.sha256


def made_of_inputs(
    out: Output, sources: Callable[[str], Sources], suffix: Callable[[str], str] = lambda key: ".png"
) -> Callable[[str], bool]:
    """The test whether the image of a key is in an output folder, whole, and of its sources as they are now."""

    def done(key: str) -> bool:
        path = out.path(key, suffix(key))
        return out.done(key, suffix(key)) and sources(key).made(os.stat(path).st_mtime_ns, lambda: source_of(path))

    return done


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except SdaError:
        return "unreadable"
