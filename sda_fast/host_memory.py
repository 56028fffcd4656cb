"""The memory that the C library's allocator holds for a process on the CPU."""

import ctypes
import os

_SETTINGS = {
    -1: -1,
    -4: 0,
}  # mallopt's M_TRIM_THRESHOLD: never; M_MMAP_MAX: no piece by itself, which would not be kept
_USERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees, for its next tensors. Returns whether it will.

    By default the GNU C library gives large tensors back to the system when they are freed, and the system clears and
    maps every page of the next one again: a quarter of the time of a step of ADM-256 on the CPU. The price is that the
    process stays as large as it was at its largest. It holds for the whole process, so the commands of `sda-fast` call
    it and the library does not; nothing changes with another C library, or where an environment variable (MALLOC_...,
    GLIBC_TUNABLES) already says what the allocator should do.
    """
    if any(name in os.environ for name in _USERS) or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        libc = ctypes.CDLL(None)
        return hasattr(libc, "gnu_get_libc_version") and all(libc.mallopt(*s) == 1 for s in _SETTINGS.items())
    except (OSError, TypeError, AttributeError):  # no such library or function: another system
        return False
