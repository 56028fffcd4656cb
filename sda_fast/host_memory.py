"""The memory that the C library's allocator holds for a process on the CPU."""

import ctypes
import os

# mallopt's M_TRIM_THRESHOLD: never; M_MMAP_MAX: no large piece of its own, which would not be kept.
_SETTINGS = {-1: -1, -4: 0}
_USERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")
VARIABLE = "SDA_FAST_KEEP_MEMORY"  # 0: leave the allocator as it is
kept = False  # what this process frees, through `keep_freed_memory`


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees, for its next tensors. Returns whether it will (also in `kept`).

    By default the GNU C library gives large tensors back to the system when they are freed, and the system clears and
    maps every page of the next one again: on the CPU half the time of the published step of ADM-256 and a fifth of ours.
    The price is that the process stays as large as it was at its largest. It holds for the whole process, so the
    commands of `sda-fast` call it and the library does not. Nothing changes with another C library, where the
    environment variable SDA_FAST_KEEP_MEMORY is 0, or where others (MALLOC_..., GLIBC_TUNABLES) already say what the
    allocator should do.
    """
    global kept
    users = any(name in os.environ for name in _USERS) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if users or os.environ.get(VARIABLE) == "0":
        return kept
    try:
        libc = ctypes.CDLL(None)
        kept = hasattr(libc, "gnu_get_libc_version") and all(libc.mallopt(*pair) == 1 for pair in _SETTINGS.items())
    except (OSError, TypeError, AttributeError):  # no such library or function: another system
        pass
    return kept
