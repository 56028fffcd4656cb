"""Fetching published checkpoints: resumed where a connection was cut, checked, in place whole or not at all."""

import fcntl
import hashlib
import http.client
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO

from sda_fast import __version__
from sda_fast.errors import SdaError
from sda_fast.published import RemoteFile, find_published

Report = Callable[[str, int, int | None], None]  # file name, bytes there, bytes in all where known
_CHUNK = 1 << 20
_TIMEOUT = 60.0  # seconds without a byte


def fetch(name: str, folder: str | Path, report: Report | None = None) -> Path:
    """Fetch a published checkpoint into `folder`; returns the file, or the folder of one of several files.

    What is there already is checked and kept; what an interrupted call left is gone on with. Raises SdaError for an
    unknown name, and if a file cannot be fetched or written, or is not the published one; then nothing is in its place.
    """
    checkpoint = find_published(name)
    if len(checkpoint.files) == 1:
        file = checkpoint.files[0]
        return download(file, Path(folder) / file.name, report)
    for file in checkpoint.files:
        download(file, Path(folder) / checkpoint.name / file.name, report)
    return Path(folder) / checkpoint.name


def download(file: RemoteFile, target: Path, report: Report | None = None) -> Path:
    """Fetch one file to `target`, by way of `target`.part beside it. Raises SdaError as `fetch` does."""
    if target.exists():
        if problem := _difference(file, target):
            raise SdaError(f"{target} exists and is not the published file ({problem}): move it away")
        return target
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab") as out:
            _lock(out, target)
            _transfer(file, out, _validator_path(part), report or (lambda name, done, total: None))
            out.flush()
            os.fsync(out.fileno())
            if problem := _difference(file, part):
                _discard(part)
                raise SdaError(f"{file.url} is not the published file ({problem}): nothing was kept of it; try again")
            os.replace(part, target)
    except OSError as error:
        raise SdaError(
            f"{target} cannot be written ({error.strerror}): make room or choose another folder; "
            "what is fetched so far is kept"
        ) from error
    _validator_path(part).unlink(missing_ok=True)
    return target


def _validator_path(part: Path) -> Path:
    """Where the server's name for this version of the file is kept: a part is only continued with the same one."""
    return part.with_name(part.name + ".version")


def _discard(part: Path) -> None:
    part.unlink()
    _validator_path(part).unlink(missing_ok=True)


def _lock(out: IO[bytes], target: Path) -> None:
    try:
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise SdaError(f"another process is fetching {target}: wait for it") from error


def _transfer(file: RemoteFile, out: IO[bytes], validator: Path, report: Report) -> None:
    """Append what is missing to the open part; returns when all of it is there."""
    out.seek(0, os.SEEK_END)
    done = out.tell()
    if done and done == file.size:
        return
    response = _request(file.url, done, validator)
    if response is None:  # the server has no more than this
        return
    with response:
        if not _continues(response, done):
            out.truncate(0)
            done = 0
        length = response.headers["Content-Length"]
        total = file.size if length is None else done + int(length)
        if file.size is not None and total != file.size:
            raise SdaError(f"{file.url} has {total} bytes instead of {file.size}: its publisher has changed it")
        free = shutil.disk_usage(validator.parent).free
        if total is not None and free < total - done:
            raise SdaError(f"{validator.parent} has {free} bytes left, {file.name} needs {total - done}: make room")
        if version := response.headers["ETag"] or response.headers["Last-Modified"]:
            validator.write_text(version)
        report(file.name, done, total)
        while chunk := _read(response, file, done, total):
            out.write(chunk)
            done += len(chunk)
            report(file.name, done, total)
    if total is not None and done < total:
        raise _cut(file, done, total)


def _request(url: str, done: int, validator: Path) -> http.client.HTTPResponse | None:
    """The response with the bytes from `done` on, or with all of them; None if there are no more."""
    headers = {"User-Agent": f"sda-fast/{__version__}", "Accept-Encoding": "identity"}
    if done:
        headers["Range"] = f"bytes={done}-"
        if validator.exists():
            headers["If-Range"] = validator.read_text()
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers["Content-Range"] == f"bytes */{done}":
            return None
        if error.code == 416:  # the part is longer than the file
            return _request(url, 0, validator)
        raise SdaError(f"{url} cannot be fetched ({error.code} {error.reason}): see whether it has moved") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise SdaError(f"{url} cannot be reached ({reason}): check the network and try again") from error


def _continues(response: http.client.HTTPResponse, done: int) -> bool:
    return response.status == 206 and (response.headers["Content-Range"] or "").startswith(f"bytes {done}-")


def _read(response: http.client.HTTPResponse, file: RemoteFile, done: int, total: int | None) -> bytes:
    try:
        return response.read(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _cut(file, done, total) from error


def _cut(file: RemoteFile, done: int, total: int | None) -> SdaError:
    return SdaError(
        f"the connection was cut after {done} of {total or 'unknown'} bytes of {file.url}: "
        "the same command goes on there"
    )


def _difference(file: RemoteFile, path: Path) -> str | None:
    """In what a file differs from the published one; None if size and checksum, where known, agree."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"{size} bytes instead of {file.size}"
    if file.checksum is None:
        return None
    kind, _, digits = file.checksum.partition(":")
    with open(path, "rb") as content:
        found = hashlib.file_digest(content, kind).hexdigest()
    return None if found.startswith(digits) else f"{kind} {found[: len(digits)]} instead of {digits}"
