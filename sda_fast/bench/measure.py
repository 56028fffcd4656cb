"""Times, memory and rates of this machine."""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from sda_fast import host_memory
from sda_fast.numerics import CUBLAS

SOURCE = Path(__file__).parents[2]
_COPIED = {"cpu": 2**27, "cuda": 2**31}  # bytes, several times what a cache holds
_SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices multiplied
_REPEATS = 3
_ENOUGH = 0.05  # seconds of one product


def interleaved(calls: list[Callable[[], Any]], repeats: int, device: str) -> list[float]:
    """Median seconds of each call, taken in turn so that a drifting machine favours none."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for taken, call in zip(times, calls, strict=True):
            taken.append(seconds(call, device))
    return [statistics.median(taken) for taken in times]


def seconds(call: Callable[[], Any], device: str) -> float:
    """Of one call, waiting for the device."""
    wait(device)
    started = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - started


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def host_peak(call: Callable[[], Any]) -> int | None:
    """Bytes of this process's memory at the worst moment of a call above what stood before; None where the system
    (Linux with the GNU C library) does not say."""
    try:
        host_memory.release_freed_memory()  # so that taking it again shows
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError, StopIteration):
        return None


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


@cache
def matmul_rate(device: str, dtype: torch.dtype, threads: int) -> float:
    """TFLOP/s of a large matrix product on the device; threads: torch's present number."""
    kind = torch.device(device).type
    best, taken, side = 0.0, 0.0, 256
    with tf32(False):
        while taken < _ENOUGH and side < _SIDE[kind]:  # a CPU without instructions for a dtype would take minutes
            side *= 2
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            product = partial(torch.matmul, a, b)
            product()
            taken = min(seconds(product, device) for _ in range(_REPEATS))
            best = max(best, 2 * side**3 / taken / 1e12)
    return best


@cache
def copy_rate(device: str, threads: int) -> float:
    """GB/s of copying memory on the device, read plus written; threads: torch's present number."""
    source = torch.empty(_COPIED[torch.device(device).type], dtype=torch.int8, device=device).zero_()
    target = torch.empty_like(source)
    target.copy_(source)
    (taken,) = interleaved([lambda: target.copy_(source)], _REPEATS, device)
    return 2 * source.numel() / taken / 1e9


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 products on a GPU may be rounded to TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = allowed
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def environment(device: str, source: Path = SOURCE) -> dict[str, Any]:
    """What a row must say of where it was measured; source: the folder whose commit is told, if it has one."""
    gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else _processor(),
        "threads": torch.get_num_threads(),
        "freed_memory_kept": host_memory.kept,
        "torch": torch.__version__,
        "triton": getattr(sys.modules.get("triton"), "__version__", None),
        "cuda": torch.version.cuda if gpu else None,
        **({"cublas_workspace_config": os.environ.get(CUBLAS)} if gpu else {}),
        "commit": _commit(source),
    }


@cache
def _commit(source: Path) -> str | None:
    if given := os.environ.get("SDA_FAST_COMMIT"):  # of a copy without its repository
        return given
    if not (source / ".git").exists():
        return None  # installed: what stands above may be another repository
    try:
        command = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
