"""Files written whole or not at all: beside their place under a temporary name, then renamed over it."""

import hashlib
import itertools
import json
import os
import socket
from pathlib import Path
from typing import Any

from sda_fast.errors import WriteError


def write_bytes(content: bytes, path: str | os.PathLike[str], mtime_ns: int | None = None) -> Path:
    """Write a file and return its path; a reader sees the earlier file or the new one, never a part.

    mtime_ns: the time of writing that it gets, in nanoseconds; by default now.
    Folders above `path` are made. Raises WriteError if it cannot be written; then nothing is left behind.
    """
    path = Path(path)
    temporary = path.parent / temporary_name()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            if mtime_ns is not None:  # not before: a temporary file that looks old is taken for abandoned
                os.utime(path, ns=(mtime_ns, mtime_ns))
        except BaseException:  # Ctrl-C included
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise WriteError(f"{path} cannot be written ({error.strerror}): use another output folder.") from error
    return path


def write_json(value: Any, path: str | os.PathLike[str]) -> Path:
    """Write a value as indented JSON, by `write_bytes`. Raises TypeError for what JSON does not know."""
    return write_bytes(json.dumps(value, indent=2).encode() + b"\n", path)


_writes = itertools.count()


def temporary_name() -> str:
    """A hidden file name that no other writer uses; short, as the final name may be as long as allowed."""
    return f".sda-{machine_id()}-{os.getpid()}-{next(_writes)}.tmp"


def machine_id() -> str:
    """Eight characters for host and container: within one of them, a process number means something."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        namespace = ""
    return hashlib.sha256(f"{socket.gethostname()}\0{namespace}".encode()).hexdigest()[:8]
