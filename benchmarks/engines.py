"""A step of ADM-256 (guided) or DiT-XL/2 on every engine, precision and batch, against the published code.

    python benchmarks/engines.py --model adm|dit [--device cuda|cpu] [--tiny] [--minutes N] [--output FOLDER]

Parity first, then s/image, TFLOP/s, share of the measured matrix products, memory: rows as `sda-fast bench` writes
them, appended to <output>/engines-<model>.jsonl. What does not fit into memory is a row that says so. After --minutes
nothing new begins, and a line names what is left; the same call goes on from there. Weights are random.
"""

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from harness import ROOT

from sda_fast.bench import TINY, bench_step, load_model, random_model
from sda_fast.bench.measure import environment
from sda_fast.engines.batch_size import is_out_of_memory

PRESETS = {"adm": "adm-256-uncond", "dit": "dit-xl-2-256"}


@dataclass(frozen=True)
class Configuration:
    engine: str
    options: dict[str, bool]  # of the engine, other than its own
    precision: str
    batch: int
    phase_convolutions: bool = False  # of the ADM
    guided: bool = True  # of the ADM: without, the forward pass alone, as `jacobian_free` takes it

    def __str__(self) -> str:
        options = "".join(f", {name.replace('_', ' ')} {value}" for name, value in self.options.items())
        changes = (", phase convolutions" * self.phase_convolutions) + (", forward alone" * (not self.guided))
        return f"{self.engine}{options}, {self.precision}, batch {self.batch}{changes}"


def configurations(model: str, device: str, tiny: bool) -> list[Configuration]:
    """The most telling ones first: every engine at the first batch, then the first engine with one thing changed."""
    engines: list[tuple[str, dict[str, bool]]] = [("inductor", {}), ("inductor", {"cuda_graphs": False}), ("eager", {})]
    changed: list[dict[str, bool]] = [{"fusion": False}, {"deterministic": False}]
    if model == "adm":  # DiT convolves its patches alone
        changed.append({"deterministic": False, "cudnn_benchmark": True})
    if device == "cpu":
        engines, changed = [("eager", {})] if tiny else [("inductor", {}), ("eager", {})], []
    batches = (1, 2) if tiny else (32, 16, 8, 64, 1)
    every = [
        Configuration(*engine, precision, n) for precision in ("bf16", "fp16") for n in batches for engine in engines
    ]
    others = [replace(every[0], precision="fp16")]  # which the original takes
    others += [replace(every[0], options=options) for options in changed]
    if model == "adm":
        others += [replace(every[0], phase_convolutions=True), replace(every[0], guided=False)]
    first = [*every[: len(engines)], *others]
    return [*first, *(configuration for configuration in every if configuration not in first)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, choices=tuple(PRESETS))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="tiny models and batches: does it run at all?")
    parser.add_argument("--minutes", type=float, default=7.0, help="begin no configuration after this time")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, required=True, help="folder that takes the rows")
    options = parser.parse_args()
    begin = time.monotonic()
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / f"engines-{options.model}{'-tiny' if options.tiny else ''}.jsonl"
    preset = "tiny" if options.tiny else PRESETS[options.model]
    here = environment(options.device, ROOT)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = [key(row) for row in rows if "failed" not in row]
    asked = configurations(options.model, options.device, options.tiny)
    todo = [c for c in asked if key({"asked": asdict(c), **here}) not in done]
    model = random_model(*TINY[options.model]) if options.tiny else load_model(preset)
    failed = False
    for i, configuration in enumerate(todo):
        if time.monotonic() - begin > 60 * options.minutes:
            print("LEFT for another call:", "; ".join(map(str, todo[i:])))
            break
        row = measure(model, preset, configuration, options.device, 1 if options.tiny else options.repeats)
        row |= {"asked": asdict(configuration), **environment(options.device, ROOT)}
        with file.open("a") as out:
            out.write(json.dumps(row) + "\n")
        print(line(configuration, row), flush=True)
        failed |= "failed" in row
    sys.exit(1 if failed else 0)


def key(row: dict[str, Any]) -> str:
    """What makes two rows the same measurement."""
    return json.dumps([row["asked"], row["device"], row["torch"], row["commit"]], sort_keys=True)


def measure(model: Any, preset: str, asked: Configuration, device: str, repeats: int) -> dict[str, Any]:
    try:
        return bench_step(model, preset, **asdict(asked), device=device, repeats=repeats, profile=True)
    except Exception as error:  # the others are measured all the same
        full = any(map(is_out_of_memory, chain(error)))
        if not full:
            traceback.print_exception(error)
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return {"benchmark": "step", "preset": preset, "skipped" if full else "failed": reason}
    finally:
        gc.collect()
        torch._dynamo.reset()
        if device == "cuda":
            torch.cuda.empty_cache()


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it: where memory runs out in a graph's capture, ending the capture fails as well."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def line(asked: Configuration, row: dict[str, Any]) -> str:
    if "failed" in row or "skipped" in row:
        return f"{asked}: {'FAILED: ' + row['failed'] if 'failed' in row else 'SKIPPED: ' + row['skipped']}"
    peak = "unknown" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f} GB"
    return (
        f"{asked}: {row['seconds_per_image']:.4g} s/image, {row['speedup']:.2f}x {row['reference']}; "
        f"{row['tflop_per_s']:.4g} TFLOP/s ({row['fraction_of_matmul']:.0%} of a matrix product), peak {peak}, "
        f"prepared in {row['prepare_seconds']:.1f} s"
    )


if __name__ == "__main__":
    main()
