"""Pages that a process frees are the next tensor's, and are not taken from the system again."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sda_fast import cli
from sda_fast.stages import batches

NAMES = ("MALLOC", "GLIBC_TUNABLES", "SDA_FAST_KEEP_MEMORY")
PAGES = 2**26 // resource.getpagesize()  # of a tensor
HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
GLIBC = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or (HUGE.exists() and "[always]" in HUGE.read_text()),
    reason="another C library, or pages of another size",
)

FAULTS = """
import resource, sys, torch
from sda_fast.host_memory import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "keep" else None
for _ in range(20):  # until the allocator has found a place for it
    torch.zeros(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.zeros(2**24)
print(kept, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 4)
"""


def faults(*arguments, **environment):
    """What `keep_freed_memory` returned, and how many pages a tensor of 64 MiB took from the system."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(NAMES)}
    run = [sys.executable, "-c", FAULTS, *arguments]
    said = subprocess.run(run, env=clean | environment, capture_output=True, text=True, check=True)
    kept, pages = said.stdout.split()
    return kept, int(pages)


@GLIBC
def test_freed_memory_is_kept():
    assert faults("leave")[1] >= PAGES / 2
    kept, pages = faults("keep")
    assert kept == "True"
    assert pages <= PAGES / 100


@GLIBC
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072"),
        ("SDA_FAST_KEEP_MEMORY", "0"),
    ],
)
def test_what_the_user_set_stays(name, value):
    kept, pages = faults("keep", **{name: value})
    assert kept == "False"
    assert pages >= PAGES / 2


def test_another_library_is_left_alone(monkeypatch):
    from sda_fast import host_memory

    for name in [name for name in os.environ if name.startswith(NAMES)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda _: object())
    assert not host_memory.keep_freed_memory()


def test_who_keeps(monkeypatch):
    called = []
    monkeypatch.setattr("sda_fast.host_memory.keep_freed_memory", lambda: called.append("command"))
    monkeypatch.setattr(batches, "keep_freed_memory", lambda: called.append("worker"))
    monkeypatch.setattr(batches, "_make", None)
    monkeypatch.setattr(sys, "argv", ["sda-fast", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    threads = torch.get_num_threads()
    batches._initialise(lambda: None, ())
    torch.set_num_threads(threads)
    assert called == ["command", "worker"]
