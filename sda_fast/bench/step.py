"""A step on an engine: parity against float32 first, then time, arithmetic, bytes and memory beside the original's."""

import json
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from sda_fast.bench.baseline import plain_outputs, published, published_step
from sda_fast.bench.measure import copy_rate, environment, host_peak, interleaved, matmul_rate, seconds, tf32
from sda_fast.bench.models import architecture, fake_step, make_step
from sda_fast.bench.profile import profile_kernels
from sda_fast.engines import Precision, create_engine
from sda_fast.engines.ledger import Ledger, count
from sda_fast.engines.steps import dtype_of
from sda_fast.errors import SdaError
from sda_fast.models import ADM, DiT

FP32_BOUND = 1e-4  # relative error of every output
COMPARED = 4  # images of a batch, at most
HALF_FACTOR = 1.5  # in half precision: how many times the error of plain autocast

Row = dict[str, Any]


def bench_step(
    model: ADM | DiT,
    preset: str,
    *,
    engine: str = "eager",
    precision: Precision = "fp32",
    batch: int = 1,
    guided: bool = True,
    phase_convolutions: bool = False,
    device: str = "cpu",
    repeats: int = 3,
    options: dict[str, Any] | None = None,
    profile: bool = False,
) -> Row:
    """One JSON-able row of a step of `model`, which is moved to the device; options: the engine's fields; profile: with
    "kernels", the seconds of a further run kernel by kernel.

    `parity` is that of the images `compared`, up to four, the first and last of the batch; where it fails, the row has
    "failed", a sentence, in place of times. Seconds are the median of `repeats` runs, taken in turn with the original's
    (`baseline.published_step`). Peak memory: on a GPU the most that was allocated from preparation on above what stood
    before it, on the CPU by how much the process grew in a run.
    """
    if batch < 1 or repeats < 1:
        raise SdaError("--batch and --repeats must be at least 1")
    model = model.to(device).eval()
    guided = guided and isinstance(model, ADM)
    gpu = device != "cpu"
    step = make_step(model, precision, guided, phase_convolutions)
    example = step.example(batch)
    chosen = create_engine(engine, **(options or {}))
    chosen.check(step, torch.device(device))
    with tf32(False):
        images = _compared(batch)
        bounds, exact = _bounds(model, step.outputs, example, images, precision, guided)
        before = 0
        if gpu:
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        programs = []
        prepare_seconds = seconds(lambda: programs.append(chosen.prepare(step, example)), device)
        (program,) = programs
        outputs = dict(zip(step.outputs, program.run(*example), strict=True))
        errors = {name: relative_error(outputs[name][images], exact[name]) for name in exact}
        row: Row = {
            "benchmark": "step",
            "preset": preset,
            "step": type(step).__name__,
            "batch": batch,
            **program.describe(),
            "options": options or {},
            "phase_convolutions": phase_convolutions,
            "compared": images,
            "parity": {name: {"error": errors[name], "bound": bounds[name]} for name in exact},
            "prepare_seconds": prepare_seconds,
            **environment(device),
        }
        bad = [f"{name} by {errors[name]:.1e} (allowed {bounds[name]:.1e})" for name in exact if not _holds(row, name)]
        if bad:
            return {**row, "failed": f"the step differs from float32 in {', '.join(bad)}: no time is reported"}
        if gpu:
            program.run(*example)
            peak: int | None = torch.cuda.max_memory_allocated(device) - before
        else:
            peak = host_peak(lambda: program.run(*example))
        reference, reference_batch, text = published_step(model, guided, batch, device)
        reference()
        ours, theirs = interleaved([lambda: program.run(*example), reference], repeats, device)
        kernels = {"kernels": profile_kernels(lambda: program.run(*example), device)} if profile else {}
    settings: Any = dict(guided=guided, phase_convolutions=phase_convolutions, device=device)
    ledger = _ledger(type(model), model.config, engine, precision, batch, **settings)
    return row | {
        "unit": "s",
        "repeats": repeats,
        "seconds_per_image": ours / batch,
        "reference": text,
        "reference_seconds_per_image": theirs / reference_batch,
        "speedup": theirs / reference_batch / (ours / batch),
        **_rates(ledger, ours, precision, device),
        "peak_bytes": peak,
        **kernels,
    }


def step_ledger(
    preset: str,
    *,
    engine: str,
    precision: Precision,
    batch: int,
    guided: bool,
    phase_convolutions: bool = False,
    device: str,
) -> Row:
    """One JSON-able row: the counts of `engines.ledger` and the seconds this machine needs for them at its measured
    rates of matrix products (in the precision) and of copying. No weights are made."""
    if batch < 1:
        raise SdaError("--batch must be at least 1")
    kind, config = architecture(preset)
    guided = guided and kind is ADM
    settings: Any = dict(guided=guided, phase_convolutions=phase_convolutions, device=device)
    ledger = _ledger(kind, config, engine, precision, batch, **settings)
    matmul = matmul_rate(device, dtype_of(precision), torch.get_num_threads())
    copy = copy_rate(device, torch.get_num_threads())
    total = ledger.total
    return {
        "benchmark": "ledger",
        "preset": preset,
        "step": "DiTStep" if kind is DiT else "GuidedStep" if guided else "UnguidedStep",
        "batch": batch,
        "precision": precision,
        "phase_convolutions": phase_convolutions,
        "layout": "channels_last" if _channels_last(engine, precision) else "contiguous",
        **asdict(ledger),
        "kernels": total.kernels,
        "bytes": total.read + total.written,
        "matmul_tflop_per_s": matmul,
        "copy_gb_per_s": copy,
        "floor_seconds": {
            "products": ledger.flops / matmul / 1e12,
            "bytes": (total.read + total.written) / copy / 1e9,
        },
        **environment(device),
    }


def relative_error(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact|| over all elements; NaN where anything is."""
    exact = exact.double()
    return ((found.double() - exact).norm() / exact.norm()).item()


def _compared(batch: int) -> list[int]:
    """The images of a batch whose outputs are compared: the first and the last ones, for the published network takes
    as long for 64 as everything else together."""
    ends = COMPARED // 2
    return list(range(batch)) if batch <= COMPARED else [*range(ends), *range(batch - ends, batch)]


def _bounds(
    model: ADM | DiT,
    names: tuple[str, ...],
    example: tuple[Tensor, ...],
    images: list[int],
    precision: Precision,
    guided: bool,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The allowed relative error of every output, and the outputs of these images in float32."""
    network = published(model)
    exact = dict(zip(names, plain_outputs(network, example, images, guided), strict=True))
    if precision == "fp32":
        return dict.fromkeys(names, FP32_BOUND), exact
    plain = plain_outputs(network, example, images, guided, dtype_of(precision))
    errors = {name: relative_error(y, exact[name]) for name, y in zip(names, plain, strict=True)}
    if guided:  # one number per image, which can be right by chance: as wrong as the gradient it belongs to
        errors["squares"] = max(errors["squares"], errors["cotangent"])
    return {name: HALF_FACTOR * error for name, error in errors.items()}, exact


def _holds(row: Row, name: str) -> bool:
    return row["parity"][name]["error"] <= row["parity"][name]["bound"]  # a NaN does not


def _ledger(
    kind: type[ADM] | type[DiT],
    config: dict[str, Any],
    engine: str,
    precision: Precision,
    batch: int,
    **settings: Any,
) -> Ledger:
    key = json.dumps([kind.__name__, config, _channels_last(engine, precision), precision, batch, settings])
    if key not in _COUNTED:  # ten seconds and more for a large network, the same for many engines and options
        with fake_step(kind, config, precision, batch, **settings) as (step, example):
            _COUNTED[key] = count(step, example, channels_last=_channels_last(engine, precision))
    return _COUNTED[key]


_COUNTED: dict[str, Ledger] = {}


def _channels_last(engine: str, precision: Precision) -> bool:
    """How an engine lays out images: as its `prepare` does."""
    return engine == "inductor" or (engine == "eager" and precision != "fp32")


def _rates(ledger: Ledger, taken: float, precision: Precision, device: str) -> Row:
    threads = torch.get_num_threads()
    total = ledger.total
    rates = {
        "tflop_per_s": ledger.flops / taken / 1e12,
        "matmul_tflop_per_s": matmul_rate(device, dtype_of(precision), threads),
        "gb_per_s": (total.read + total.written) / taken / 1e9,
        "copy_gb_per_s": copy_rate(device, threads),
    }
    share = rates["tflop_per_s"] / rates["matmul_tflop_per_s"]
    return {"flops": ledger.flops, "bytes": total.read + total.written, **rates, "fraction_of_matmul": share}
