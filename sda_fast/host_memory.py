"""The memory that the C library's allocator holds for a process on the CPU."""

import contextlib
import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt
NEVER, NONE = -1, 0  # to give the end of the heap back; large pieces apart from the heap, which would not be kept
_USERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")
kept = False  # what this process frees, through `keep_freed_memory`


def keep_freed_memory() -> bool:
    """Have the GNU C library keep the memory that this process frees, for its next tensors. Returns whether it said it
    would (also in `kept`).

    By default it gives large tensors back to the system, and the system clears and maps every page of the next one
    again: on the CPU half the time of the published step of ADM-256 and a fifth of ours. The price is that the process
    stays as large as it was at its largest. It holds for the whole process, so the commands of `sda-fast` and its
    worker processes call it, and the library does not. Nothing changes with another C library, where the
    environment variable SDA_FAST_KEEP_MEMORY is 0, or where MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_,
    MALLOC_MMAP_MAX_, MALLOC_TOP_PAD_ or GLIBC_TUNABLES already tell the allocator what to do.
    """
    global kept
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    users = any(name in os.environ for name in _USERS) or "malloc" in tunables
    if users or os.environ.get("SDA_FAST_KEEP_MEMORY") == "0":
        return kept
    with contextlib.suppress(OSError, TypeError, AttributeError):  # no such library or function: another system
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            kept = libc.mallopt(M_TRIM_THRESHOLD, NEVER) == 1 and libc.mallopt(M_MMAP_MAX, NONE) == 1
    return kept


def release_freed_memory() -> None:
    """Give what is free back to the system, kept or not; nothing with another C library."""
    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
