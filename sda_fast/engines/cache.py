"""A folder of built engines, each under the hash of everything it depends on.

A plan is code that will run, so nothing is taken from the folder on the strength of its name: it must belong to the
user alone, and content and settings of an entry must agree with the hash and the settings stored beside it. What does
not agree, whoever damaged it, is built again. Entries are written whole or not at all; of several processes that want
the same one, one builds and the others wait.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sda_fast.errors import SdaError
from sda_fast.files import write_bytes, write_json

Settings = Mapping[str, Any]
_WORK = ".building"
logger = logging.getLogger(__name__)


def default_folder() -> Path:
    """`engines` in `$SDA_FAST_CACHE`, or in ~/.cache/sda_fast."""
    root = os.environ.get("SDA_FAST_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "sda_fast") / "engines"


class EngineCache:
    """Entries are found by `settings`, a dictionary that JSON can hold: all that the content depends on."""

    def __init__(self, folder: Path):
        """Makes the folder, for this user alone. Raises SdaError if others may write to it."""
        self.folder = folder
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            status = folder.stat()
        except OSError as error:
            raise SdaError(
                f"engine cache {folder} cannot be made ({error.strerror}): set SDA_FAST_CACHE to a folder of yours"
            ) from error
        if status.st_uid != os.geteuid():
            raise SdaError(f"engine cache {folder} belongs to another user: set SDA_FAST_CACHE to a folder of yours")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise SdaError(f"engine cache {folder} can be written by others: chmod 700 it and see what is in it")
        self._remove_leftovers()

    def find(self, settings: Settings) -> bytes | None:
        """What is stored under the settings; None, with a warning in the log, if it is not as it was stored."""
        with self._lock(_name(settings)):
            return self._read(settings)

    def store(self, settings: Settings, content: bytes) -> None:
        """Raises SdaError if it cannot be written."""
        name = _name(settings)
        with self._lock(name), self._work_folder(name) as work:
            self._write(settings, content, work)

    def obtain(self, settings: Settings, build: Callable[[Path], bytes], refused: bytes | None = None) -> bytes:
        """What is stored under the settings, or else what `build` gives, which is then stored.

        build: called with an empty folder for its files. refused: content that was found and shall not be found again.
        Raises what `build` raises, and SdaError if the entry cannot be written.
        """
        name = _name(settings)
        with self._lock(name):
            found = self._read(settings)
            if found is not None and found != refused:
                return found
            with self._work_folder(name) as work:
                content = build(work)
                self._write(settings, content, work)
            return content

    def _read(self, settings: Settings) -> bytes | None:
        path, record_path = self._paths(_name(settings))
        if not path.exists() and not record_path.exists():
            return None
        try:
            record, content = json.loads(record_path.read_bytes()), path.read_bytes()
            problem = _difference(record, settings, content)
        except (OSError, ValueError) as error:  # half of an entry, or no JSON
            content, problem = b"", str(error)
        if problem is None:
            return content
        logger.warning("%s is not as it was stored (%s): it is not used, and made anew", path, problem)
        return None

    def _write(self, settings: Settings, content: bytes, work: Path) -> None:
        record = {"sha256": hashlib.sha256(content).hexdigest(), "settings": dict(settings)}
        path, record_path = self._paths(_name(settings))
        moves = (write_bytes(content, work / "content"), path), (write_json(record, work / "record"), record_path)
        for written, place in moves:
            os.replace(written, place)

    def _paths(self, name: str) -> tuple[Path, Path]:
        return self.folder / f"{name}.plan", self.folder / f"{name}.json"

    @contextmanager
    def _work_folder(self, name: str) -> Iterator[Path]:
        """An empty folder for whoever holds the entry's lock; what a killed process left there is removed."""
        work = self.folder / f"{name}{_WORK}"
        shutil.rmtree(work, ignore_errors=True)
        try:
            try:
                work.mkdir()
            except OSError as error:
                raise SdaError(f"{work} cannot be made ({error.strerror}): see to the engine cache's folder") from error
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        """Of processes that were killed while they built what nobody has asked for since."""
        for work in self.folder.glob(f"*{_WORK}"):
            try:
                with self._lock(work.name.removesuffix(_WORK), wait=False):
                    shutil.rmtree(work, ignore_errors=True)
            except BlockingIOError:  # being built
                continue

    @contextmanager
    def _lock(self, name: str, wait: bool = True) -> Iterator[None]:
        """Raises BlockingIOError where another process holds it and `wait` is false. Ends with the process."""
        path = self.folder / f"{name}.lock"
        try:
            file = open(path, "ab")  # noqa: SIM115 (closed below)
        except OSError as error:
            raise SdaError(f"{path} cannot be opened ({error.strerror}): see to the engine cache's folder") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise
                logger.info("waiting for another process that builds %s", name)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _name(settings: Settings) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _difference(record: Any, settings: Settings, content: bytes) -> str | None:
    if not isinstance(record, dict) or record.get("settings") != json.loads(json.dumps(settings)):
        return "it was made with other settings"
    if record.get("sha256") != hashlib.sha256(content).hexdigest():
        return "its hash is another"
    return None
