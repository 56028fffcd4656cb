"""The commands about this machine: `bench`, what a step costs here, and `doctor`, what works here."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from sda_fast.cli.app import Json, app, say
from sda_fast.cli.commands import Device, PhaseConvolutions, Winograd, _check_device
from sda_fast.errors import SdaError


@app.command()
def bench(
    preset: Annotated[str, typer.Option(help="photos, adm-256-uncond or dit-xl-2-256.")] = "photos",
    engine: Annotated[str, typer.Option(help="How the step runs: eager, inductor, onnx or trt.")] = "eager",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    batch: Annotated[int | None, typer.Option(help="Images per run [1; --whole: 10].")] = None,
    repeats: Annotated[int, typer.Option(help="Measurements of each side, in turn.")] = 3,
    weights: Annotated[Path | None, typer.Option(help="Checkpoint [photos: the shipped one; others: random].")] = None,
    unguided: Annotated[bool, typer.Option("--unguided", help="The ADM's forward pass alone.")] = False,
    phase_convolutions: PhaseConvolutions = False,
    winograd: Winograd = False,
    ledger: Annotated[
        bool, typer.Option("--ledger", help="Count FLOPs, bytes, kernels and memory; time none.")
    ] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Also where a step's time goes, by kernel.")] = False,
    whole: Annotated[bool, typer.Option("--whole", help="A whole projection of photos by Projector.")] = False,
    device: Device = "cpu",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File that takes the row, .jsonl.")] = None,
    as_json: Json = False,
) -> None:
    """Time a step of a model against the published code in one run, parity first; or count what it costs."""
    from sda_fast.bench import bench_projection, bench_step, load_model, step_ledger
    from sda_fast.engines import ENGINES
    from sda_fast.engines.create import with_winograd
    from sda_fast.engines.steps import dtype_of

    _check_device(device)
    dtype_of(precision)
    if engine not in ENGINES:
        raise SdaError(f"engine {engine!r} is not known; choose one of {', '.join(ENGINES)}")
    if batch is None:
        batch = 10 if whole else 1
    if batch < 1 or repeats < 1:
        raise SdaError("--batch and --repeats must be at least 1")
    if whole and any((ledger, unguided, phase_convolutions, weights)):
        raise SdaError(
            "--whole times projections by the shipped model: leave out --ledger, --unguided, --phase-convolutions and "
            "--weights"
        )
    if ledger and weights:
        raise SdaError("--ledger counts, which does not depend on weights: leave out --weights")
    if ledger and winograd:
        raise SdaError("--ledger counts direct convolutions: leave out --winograd")
    if profile and (ledger or whole):
        raise SdaError("--profile is of a step that is timed: leave out --ledger and --whole")
    if winograd:
        with_winograd(engine)
    settings: Any = {"engine": engine, "precision": precision}
    options = {"winograd": True} if winograd else {}
    if whole:
        row = bench_projection(preset, batch, repeats, device, **settings, options=options)
        text = _projection_text
    else:
        settings |= {"batch": batch, "guided": not unguided, "phase_convolutions": phase_convolutions, "device": device}
        if ledger:
            row, text = step_ledger(preset, **settings), _ledger_text
        else:
            model = load_model(preset, weights)
            row = bench_step(model, preset, **settings, repeats=repeats, options=options, profile=profile)
            row["weights"] = str(weights or ("shipped" if preset == "photos" else "random"))
            text = _step_text
    if output is not None:
        _append(row, output)
    if "failed" in row:
        raise SdaError(row["failed"])
    say(row, as_json, "" if as_json else text(row))


def _append(row: dict[str, Any], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise SdaError(f"{path} cannot be written ({error.strerror}): choose another --output") from error


def _projection_text(row: dict[str, Any]) -> str:
    reference, ours = row["reference_seconds_per_image"], row["seconds_per_image"]
    text = f"published algorithm {reference:.3f} s/image, Projector {ours:.3f} s/image: {row['speedup']:.2f}x "
    if "eager_seconds_per_image" in row:
        text += f"(eager {row['eager_seconds_per_image']:.3f} s/image: {row['speedup_over_eager']:.2f}x) "
    return text + f"(parity: mean difference {row['parity_mean_abs']:.1e} of {row['parity_bound']:.1e})"


def _step_text(row: dict[str, Any]) -> str:
    peak = "not known" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.3f} GB"
    errors = ", ".join(f"{name} {p['error']:.1e} (of {p['bound']:.1e})" for name, p in row["parity"].items())
    kept = ", freed memory kept" if row["freed_memory_kept"] else ""
    device = row["device"] if row["cuda"] else f"{row['device']}, {row['threads']} thread(s){kept}"
    share = f"{row['fraction_of_matmul']:.0%} of the {row['matmul_tflop_per_s']:.4g} of a matrix product"
    if row.get("winograd"):
        share = "counted as direct convolutions"
    lines = {
        "relative error": errors,
        "prepared in": f"{row['prepare_seconds']:.1f} s",
        "this engine": f"{row['seconds_per_image']:.4g} s/image and step",
        "original": f"{row['reference_seconds_per_image']:.4g} s/image and step ({row['reference']})",
        "speed-up": f"{row['speedup']:.2f}x",
        "arithmetic": f"{row['tflop_per_s']:.4g} TFLOP/s, {share}",
        "bytes, unfused": f"{row['bytes'] / 1e9:.4g} GB, {row['gb_per_s']:.4g} GB/s (of a copy "
        f"{row['copy_gb_per_s']:.4g})",
        "peak memory": peak,
    }
    kernels = row.get("kernels", [])
    return "\n".join(
        [
            _head(row, device),
            *(f"  {name:<16} {value}" for name, value in lines.items()),
            *(["  by kernel, of one more run:"] if kernels else []),
            *(f"  {k['seconds']:12.6f} s {k['calls']:>6} x  {k['name'][:90]}" for k in kernels),
        ]
    )


def _ledger_text(row: dict[str, Any]) -> str:
    head = _head(row, f"{row['layout']}, {row['device']}")
    lines = [head, f"  {'operators':<18} {'kernels':>8} {'read GB':>9} {'written GB':>11}"]
    moved = sorted(row["moved"].items(), key=lambda item: -item[1]["read"] - item[1]["written"])
    total = {key: sum(m[key] for _, m in moved) for key in ("kernels", "read", "written")}
    for name, m in [*moved, ("total", total)]:
        lines.append(f"  {name:<18} {m['kernels']:>8} {m['read'] / 1e9:>9.3f} {m['written'] / 1e9:>11.3f}")
    backward = f", backward {row['backward_flops'] / 1e9:.2f}" if row["backward_flops"] else ""
    floor = row["floor_seconds"]
    lines += [
        f"  FLOPs              forward {row['forward_flops'] / 1e9:.2f} G{backward}; executed "
        f"{row['executed_flops'] / 1e9:.2f}",
        f"  saved for backward {row['saved_bytes'] / 1e9:.3f} GB; peak {row['peak_bytes'] / 1e9:.3f} GB; "
        f"weights {row['weight_bytes'] / 1e9:.3f} GB",
        f"  floor here         {floor['products']:.4g} s for the FLOPs at {row['matmul_tflop_per_s']:.4g} TFLOP/s, "
        f"{floor['bytes']:.4g} s for the bytes at {row['copy_gb_per_s']:.4g} GB/s",
    ]
    return "\n".join(lines)


def _head(row: dict[str, Any], where: str) -> str:
    how = [row["engine"]] if "engine" in row else []
    how += [row["precision"], *(name for name in ("phase_convolutions", "winograd") if row.get(name))]
    return f"{row['step']} of {row['preset']}, {', '.join(how)}, batch {row['batch']} ({where})"


@app.command()
def doctor(
    attempt: Annotated[bool, typer.Option("--try", help="Run a tiny step on every engine (a minute).")] = False,
    as_json: Json = False,
) -> None:
    """Say which parts of the package work on this machine, and what would make the others work."""
    from sda_fast.doctor import diagnose

    findings = diagnose(attempt)
    lines = [f"{'ok ' if f['works'] else 'no '} {f['part']:<22} {f['detail']}" for f in findings]
    say({"findings": findings}, as_json, "\n".join(lines))
