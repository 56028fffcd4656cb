"""One way of measuring for every operator: parity first, then times taken in turn, one JSON row per measurement.

A script `bench_<op>.py` yields `Case`s and ends with `main(cases)`:

    python benchmarks/bench_<op>.py [--device cpu|cuda] [--tiny] [--threads N] [--repeats N] [--output FOLDER]
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sda_fast.bench.measure import environment
from sda_fast.ops._backend import core

ROOT = Path(__file__).parents[1]
# Bytes written between two measurements, several times what a cache holds. On a GPU this also keeps the device busy
# while the host prepares the launch (about half a millisecond at 4 TB/s), which would else be measured as well.
FLUSH = {"cpu": 2**27, "cuda": 2**31}
COPY_BYTES = {"cpu": 2**27, "cuda": 2**31}
MIN_REPEATS = 3


@dataclass(frozen=True)
class Case:
    """One measurement: `run` against `baseline`, allowed only if `error()` stays within `tolerance`.

    bytes: what the operator must read and write, counted from its shapes. error: the largest difference of `run`'s
    result from the oracle, absolute or relative as the script says, and `tolerance` what is allowed of it. flops: where
    arithmetic is the limit.
    """

    op: str
    backend: str
    shape: list[int]
    dtype: str
    layout: str
    run: Callable[[], Any]
    bytes: int
    error: Callable[[], float]
    tolerance: float
    baseline: Callable[[], Any] | None = None
    baseline_name: str = "plain"
    flops: int = 0


def backends(device: str, *versions: str) -> list[str]:
    """Those of an operator's `versions` that are compiled and meant for the device."""
    if device == "cpu":
        return [name for name in versions if name == "cpp"]
    return [name for name in versions if name == "triton" or (name == "cuda" and core().cuda_built)]


def main(cases: Callable[[str, bool], Iterable[Case]]) -> None:
    """Measure the cases of `cases(device, tiny)`, print a line for each and append the rows to <output>/<op>.jsonl.

    Exits with 1 where a result is wrong.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="small shapes, 3 repeats: does it run at all?")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=10.0, help="stop repeating a case then (3 repeats at least)")
    parser.add_argument("--output", type=Path, help="folder that takes the rows")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    repeats = MIN_REPEATS if options.tiny else max(options.repeats, MIN_REPEATS)
    failed = False
    for case in cases(options.device, options.tiny):
        row = measure(case, options.device, repeats, options.seconds)
        failed |= "p50" not in row
        print(_line(row), flush=True)
        if options.output is not None:
            options.output.mkdir(parents=True, exist_ok=True)
            with (options.output / f"{case.op}.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
    sys.exit(1 if failed else 0)


def measure(case: Case, device: str, repeats: int, seconds: float = float("inf")) -> dict[str, Any]:
    """One row. Where parity fails, a NaN included, it holds no times."""
    _wait(device)
    started = time.perf_counter()
    case.run()
    _wait(device)
    row: dict[str, Any] = {
        "benchmark": case.op,
        "backend": case.backend,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "layout": case.layout,
        "unit": "ms",
        "first_call_ms": round(1e3 * (time.perf_counter() - started), 3),  # with compilation, where there is any
        "error": float(case.error()),
        "tolerance": case.tolerance,
        **environment(device, ROOT),
    }
    if not row["error"] <= case.tolerance:
        return row
    calls = [case.run] if case.baseline is None else [case.run, case.baseline]
    ours, *theirs = interleaved(calls, device, repeats, seconds)
    p20, p50, p80 = _quantiles(ours)
    rate = case.bytes / p50 / 1e6
    row |= {"repeats": len(ours), "p20": p20, "p50": p50, "p80": p80, "bytes": case.bytes, "gb_per_s": rate}
    copy = copy_rate(device, torch.get_num_threads())
    row |= {"copy_gb_per_s": copy, "fraction_of_copy": rate / copy}
    if case.flops:
        row |= {"flops": case.flops, "tflop_per_s": case.flops / p50 / 1e9}
    if theirs:
        row |= {"baseline": case.baseline_name, "baseline_p50": statistics.median(theirs[0])}
        row |= dict(zip(("speedup_p20", "speedup", "speedup_p80"), _quantiles(ratios(ours, theirs[0])), strict=True))
    return row


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """The speed-up of every pair of measurements taken next to each other: both saw the machine in the same mood."""
    return [other / own for own, other in zip(ours, theirs, strict=True)]


def _quantiles(values: list[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    p20, p50, p80 = statistics.quantiles(values, n=10, method="inclusive")[1::3] if len(values) > 1 else values * 3
    return p20, p50, p80


def interleaved(
    calls: list[Callable[[], Any]], device: str, repeats: int, seconds: float = float("inf")
) -> list[list[float]]:
    """Milliseconds of each call with cold caches, taken in turn so that a drifting machine favours none.

    The order turns round with every repeat, so that none always comes behind the same neighbour.

    Stops after `seconds`, but not before MIN_REPEATS.
    """
    flush = torch.empty(FLUSH[device], dtype=torch.int8, device=device)
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    begin = time.perf_counter()
    for done in range(repeats):
        if done >= MIN_REPEATS and time.perf_counter() - begin > seconds:
            break
        order = list(zip(times, calls, strict=True))
        for taken, call in order if done % 2 == 0 else reversed(order):
            # Read on a GPU: what lies written in its cache, the call would have to write back.
            flush.zero_() if device == "cpu" else flush.view(torch.int64).sum()
            taken.append(_milliseconds(call, device))
    return times


def _milliseconds(call: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        started = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@cache
def copy_rate(device: str, threads: int) -> float:
    """GB/s of copying memory on the device, read plus written, the median of ten; threads: torch's present number."""
    source = torch.empty(COPY_BYTES[device], dtype=torch.int8, device=device).zero_()
    target = torch.empty_like(source)
    (times,) = interleaved([lambda: target.copy_(source)], device, 10)
    return 2 * source.numel() / statistics.median(times) / 1e6


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _line(row: dict[str, Any]) -> str:
    shape = "x".join(map(str, row["shape"]))
    head = f"{row['benchmark']:<16} {row['backend']:<7} {shape:<18} {row['dtype']:<8} {row['layout']:<13}"
    if "p50" not in row:
        return f"{head} PARITY FAILED: error {row['error']:.1e}, allowed {row['tolerance']:.1e}; not timed"
    text = f"{head} {row['p50']:8.3f} ms  {row['gb_per_s']:7.1f} GB/s ({row['fraction_of_copy']:.0%} of copy)"
    if "tflop_per_s" in row:
        text += f"  {row['tflop_per_s']:.2f} TFLOP/s"
    if "speedup" in row:
        spread = f"{row['speedup_p20']:.2f} to {row['speedup_p80']:.2f}"
        text += f"  {row['speedup']:.2f}x {row['baseline']} ({spread})"
    return f"{text}  error {row['error']:.1e}, allowed {row['tolerance']:.1e}"
