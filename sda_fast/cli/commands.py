"""The commands. Heavy imports wait until a command runs, so that --help answers at once."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sda_fast.cli.app import Json, app, end, say
from sda_fast.errors import SdaError

if TYPE_CHECKING:
    from sda_fast.stages.config import RunConfig

Input = Annotated[Path, typer.Option("--input", "-i", help="Folder of images.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write; resumed if it exists.")]
Device = Annotated[str, typer.Option(help='Torch device, such as "cpu" or "cuda".')]
Workers = Annotated[int, typer.Option(help="Processes, of one CPU thread each; results do not depend on it.")]
Seed = Annotated[int, typer.Option(min=0, help="Key of all noise.")]
BatchSize = Annotated[
    str, typer.Option(help="Images per network pass, or auto: what memory allows. Changes last bits only.")
]
Decoder = Annotated[str, typer.Option(help="pillow (published pixels), dali or dali-gpu (JPEGs by NVIDIA DALI).")]
Engine = Annotated[str, typer.Option(help="How the network runs: eager, inductor, onnx or trt.")]
Precision = Annotated[str, typer.Option(help="Of the network: fp32, bf16 or fp16; its ends stay fp32.")]
PhaseConvolutions = Annotated[
    bool, typer.Option("--phase-convolutions", help="Upsampling and 3x3 as four 2x2: fewer FLOPs, other last bits.")
]
Winograd = Annotated[
    bool, typer.Option("--winograd", help="3x3 convolutions of inductor in bf16 by minimal filtering; on a CPU alone.")
]
Preset = Annotated[str | None, typer.Option(help="How published weights are built, such as imagenet256.")]


def _batch_size(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _check_device(device: str) -> str:
    import torch

    if device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun started one process per GPU
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SdaError(f'device {device!r} cannot be used on this machine ({reason}): give "cpu"') from error
    where = torch.device(device)
    if where.type == "cuda" and where.index is not None:
        torch.cuda.set_device(where)  # decoders and streams go to the current one
    return device


@app.command()
def synthesize(
    output: Output,
    dit: Annotated[str, typer.Option(help='DiT weights: a file, or "photos:dit".')],
    per_class: Annotated[int, typer.Option(help="Images of every class.")] = 50,
    classes: Annotated[Path | None, typer.Option(help="Class names, one per line, in the model's order.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Make this class alone; may be repeated.")] = None,
    respacing: Annotated[str, typer.Option(help="Sampling steps out of 1000.")] = "250",
    cfg_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1.0 is none.")] = 1.0,
    clip: Annotated[bool, typer.Option("--clip", help="Clamp x_0 at every step (models of pixels).")] = False,
    engine: Engine = "eager",
    precision: Precision = "fp32",
    batch_size: BatchSize = "10",
    seed: Seed = 0,
    preset: Preset = None,
    vae: Annotated[Path | None, typer.Option(help="diffusers' AutoencoderKL, for a DiT of latents.")] = None,
    device: Device = "cpu",
    workers: Workers = 1,
    as_json: Json = False,
) -> None:
    """Make labelled images with the class-conditional model, one folder per class."""
    from sda_fast.data import read_classes
    from sda_fast.stages.config import build
    from sda_fast.stages.synthesize import SynthesizeSettings
    from sda_fast.stages.synthesize import synthesize as stage
    from sda_fast.weights import weights_path

    values = {
        "respacing": respacing,
        "cfg_scale": cfg_scale,
        "clip": clip,
        "engine": engine,
        "precision": precision,
        "batch_size": _batch_size(batch_size),
        "seed": seed,
    }
    result = stage(
        output,
        weights_path(dit),
        per_class,
        read_classes(classes) if classes else None,
        only or None,
        build(SynthesizeSettings, values, "options of synthesize"),
        preset=preset,
        vae=vae,
        device=_check_device(device),
        workers=workers,
    )
    say(result, as_json, f"{result['images']} images in {output} ({result['synthesized']} made now).")


@app.command()
def align(
    input: Input,
    output: Output,
    adm: Annotated[str, typer.Option(help='ADM weights: a file, or "photos:adm".')],
    projection: Annotated[str, typer.Option(help="dda (SDA's and DDA's, guided) or diffpure.")] = "dda",
    respacing: Annotated[str | None, typer.Option(help="Steps out of 1000 [dda: 100, diffpure: 1000].")] = None,
    start: Annotated[int | None, typer.Option(help="N, the steps taken [dda: 50, diffpure: 150].")] = None,
    factor: Annotated[int, typer.Option(help="D, the low-pass filter's reduction.")] = 4,
    scale: Annotated[float, typer.Option(help="w, the strength of the guidance.")] = 6.0,
    norm: Annotated[str, typer.Option(help="image (each by itself) or batch (as published).")] = "image",
    norm_group: Annotated[int, typer.Option(help="Images of a published batch: 10 in SDA, 4 in DDA.")] = 10,
    jacobian_free: Annotated[
        bool, typer.Option("--jacobian-free", help="Guide without going back through the network: an approximation.")
    ] = False,
    engine: Engine = "eager",
    precision: Precision = "fp32",
    phase_convolutions: PhaseConvolutions = False,
    winograd: Winograd = False,
    batch_size: BatchSize = "10",
    decoder: Decoder = "pillow",
    format: Annotated[str, typer.Option(help="png, or original: JPEGs as JPEG of quality 75, as published.")] = "png",
    seed: Seed = 0,
    preset: Preset = None,
    device: Device = "cpu",
    workers: Workers = 1,
    as_json: Json = False,
) -> None:
    """Project every image of a folder onto the diffusion model's domain: synthetic ones and target ones alike."""
    from sda_fast.stages.align import AlignSettings
    from sda_fast.stages.align import align as stage
    from sda_fast.stages.config import build
    from sda_fast.weights import weights_path

    values = {
        "projection": projection,
        "respacing": respacing,
        "start": start,
        "factor": factor,
        "scale": scale,
        "norm": norm,
        "norm_group": norm_group,
        "jacobian_free": jacobian_free,
        "engine": engine,
        "precision": precision,
        "phase_convolutions": phase_convolutions,
        "winograd": winograd,
        "batch_size": _batch_size(batch_size),
        "decoder": decoder,
        "format": format,
        "seed": seed,
    }
    given = {name: value for name, value in values.items() if value is not None}
    settings = build(AlignSettings, given, "options of align")
    result = stage(
        input, output, weights_path(adm), settings, preset=preset, device=_check_device(device), workers=workers
    )
    say(result, as_json, f"{result['images']} images in {output} ({result['projected']} projected now).")
    end(output)


@app.command()
def finetune(
    input: Input,
    output: Output,
    model: Annotated[str, typer.Option(help='Classifier: a file, or "photos:resnet".')],
    recipe: Annotated[str, typer.Option(help="paper (15 epochs), code (30, as published) or photos.")] = "paper",
    drop_path: Annotated[float | None, typer.Option(help="Stochastic depth [Swin, ConvNeXt: as published].")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Images per network pass [64 or 128, as published].")] = None,
    stop_after: Annotated[int | None, typer.Option(help="Epochs after which to end, on the same curve.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    workers: Annotated[int | None, typer.Option(min=0, help="Reading processes [GPU: by cores, CPU: 0].")] = None,
    as_json: Json = False,
) -> None:
    """Adapt a classifier to aligned synthetic images; writes OUTPUT/model.safetensors."""
    from sda_fast.stages.finetune import finetune as stage
    from sda_fast.weights import weights_path

    result = stage(
        input,
        output,
        weights_path(model),
        recipe,
        drop_path=drop_path,
        micro_batch=micro_batch,
        stop_after=stop_after,
        seed=seed,
        device=_check_device(device),
        workers=workers,
    )
    say(result, as_json, f"{result['output']}: {result['epochs']} epochs of {result['images']} images.")


@app.command()
def evaluate(
    input: Input,
    output: Output,
    model: Annotated[str, typer.Option(help='Source classifier: a file, or "photos:resnet".')],
    finetuned: Annotated[str | None, typer.Option(help="The classifier that finetune wrote.")] = None,
    projection: Annotated[
        list[str] | None, typer.Option(help="KIND=FOLDER, KIND being dda or diffpure; may be repeated.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Method to score [all quick ones that can be]; repeatable.")
    ] = None,
    network: Annotated[
        list[str] | None, typer.Option(help="KIND=FILE, a diffusion model: adm, dit or vae; repeatable.")
    ] = None,
    preset: Annotated[
        list[str] | None, typer.Option(help="KIND=NAME, how published weights are built; repeatable.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="METHOD.NAME=VALUE, such as memo.views=16; repeatable.")
    ] = None,
    ensemble: Annotated[str, typer.Option(help="How original and projection are combined.")] = "sum",
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(help="Images per batch; Tent learns from each as a whole.")] = 64,
    decoder: Decoder = "pillow",
    resize: Annotated[
        bool, typer.Option(help="Enlarge as published (256, then a crop of 224), or go straight to the crop.")
    ] = True,
    engine: Engine = "eager",
    precision: Precision = "fp32",
    mce: Annotated[
        str | None, typer.Option(help="Mean corruption error too: against alexnet, or the errors in a JSON file.")
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Score methods on labelled images and their projections; prints a table with 95 % intervals."""
    from sda_fast.data import by_condition, describe, find_images
    from sda_fast.report import check_baseline, read_baseline, to_text, write_evaluation
    from sda_fast.stages.evaluate import evaluate as stage
    from sda_fast.weights import weights_path

    folders: dict[str, Path] = {}
    for item in projection or []:
        kind, folder = _kind_and_folder(item)
        _add(folders, kind, folder, f"--projection {kind}")
    baseline = None
    if mce is not None:  # what does not fit shows before the work
        baseline, (files, _) = read_baseline(mce), find_images(input)
        conditions = [describe(condition, input) for condition in by_condition(files)]
        check_baseline(mce, baseline, conditions, {file.class_name for file in files})
    how: Any = {"engine": engine, "precision": precision}
    rows = stage(
        input,
        output,
        weights_path(model),
        weights_path(finetuned) if finetuned else None,
        folders,
        method or None,
        networks=_by_kind("network", network or []),
        presets=_by_kind("preset", preset or []),
        options=_options(option or []),
        mode=ensemble,
        seed=seed,
        batch_size=batch_size,
        decoder=decoder,
        resize=resize,
        **how,
        device=_check_device(device),
    )
    tables = write_evaluation(output, rows, baseline, mce or "")
    result = {"rows": rows, "mce": [record for table in tables[1:] for record in table.records if "ce" in record]}
    say(result if mce else {"rows": rows}, as_json, to_text(tables) if tables else "No image could be scored.")
    end(output)


def _by_kind(option: str, items: list[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for item in items:
        kind, _, value = item.partition("=")
        if not value:
            raise SdaError(f"--{option} {item} is not of the form KIND=VALUE, KIND being adm, dit or vae")
        _add(values, kind, value, f"--{option} {kind}")
    return values


def _options(items: list[str]) -> dict[str, dict[str, Any]]:
    """By method and name, each value as JSON where it is that, else as text."""
    options: dict[str, dict[str, Any]] = {}
    for item in items:
        key, equals, text = item.partition("=")
        method, dot, name = key.partition(".")
        if not (equals and dot and method and name):
            raise SdaError(f"--option {item} is not of the form METHOD.NAME=VALUE, such as memo.views=16")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        _add(options.setdefault(method, {}), name, value, f"--option {key}")
    return options


def _add(values: dict[str, Any], key: str, value: Any, option: str) -> None:
    if key in values:
        raise SdaError(f"{option} is given twice ({values[key]} and {value}): give one")
    values[key] = value


def _kind_and_folder(item: str) -> tuple[str, Path]:
    kind, _, folder = item.partition("=")
    if kind not in ("dda", "diffpure") or not folder:
        raise SdaError(f"--projection {item} is not of the form dda=FOLDER or diffpure=FOLDER")
    return kind, Path(folder)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="TOML file; docs/cli.md shows one.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print what would be done, and its cost; no more.")
    ] = False,
    rate: Annotated[float | None, typer.Option(help="For --dry-run: TFLOP/s of one process, to tell the time.")] = None,
    rows: Annotated[Path | None, typer.Option(help="The same from rows of bench --output, .jsonl.")] = None,
    as_json: Json = False,
) -> None:
    """All stages from one TOML file, and a report. The same call goes on after an interruption."""
    from sda_fast.report.run import write_run_report
    from sda_fast.stages.config import read_config
    from sda_fast.stages.pipeline import run as pipeline

    if (rate is not None or rows is not None) and not dry_run:
        raise SdaError("--rate and --rows are for --dry-run: add it")
    settings = read_config(config)
    _check_device(settings.device)
    if dry_run:
        _print_plan(settings, rate, rows, as_json)
        return
    result = pipeline(settings, log=_announce)
    if result["failures"]:  # the report compares methods on the same images under every corruption
        say({"rows": result["rows"], "files": {}}, as_json, "No report yet: some images are missing.")
        end(*result["failures"])
    text, files = write_run_report(settings.output, result, command=f"sda-fast run {config}")
    say({"rows": result["rows"], "files": files}, as_json, text + "\n\n" + _listing(files))


def _print_plan(settings: "RunConfig", rate: float | None, rows: Path | None, as_json: bool) -> None:
    from sda_fast.dry_run import Rates, free_bytes, plan_table
    from sda_fast.dry_run import dry_run as plan
    from sda_fast.report import to_text

    table = plan_table(plan(settings, Rates(rate, rows)), settings)
    free = free_bytes(settings.output)
    say({"stages": table.records, "free_bytes": free, "note": table.note}, as_json, to_text(table))


@app.command()
def demo(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write [runs/demo, with --full runs/full].")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="All 1400 test patches under every corruption (hours).")] = False,
    per_class: Annotated[int | None, typer.Option(help="Test patches of every class and corruption.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes [CPU: one per core, GPU: 1].")] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Both stages of SDA on the photographs testbed with the weights that ship with the package."""
    from sda_fast.photos.demo import FULL, SMALL, demo_config
    from sda_fast.photos.testbed import write_testbed
    from sda_fast.report.run import write_run_report
    from sda_fast.stages.pipeline import run as pipeline

    output = output or Path("runs", "full" if full else "demo")
    device = _check_device(device)
    if workers is None:
        workers = (os.cpu_count() or 1) if device == "cpu" else 1
    size = {**(FULL if full else SMALL), **({} if per_class is None else {"per_class": per_class})}
    settings = demo_config(
        output,
        synthetic=size["synthetic"],
        ablation=bool(size["ablation"]),
        workers=workers,
        device=device,
    )
    _announce("test patches")
    write_testbed(settings.target, size["per_class"], exactly=True)
    result = pipeline(settings, log=_announce)
    command = f"sda-fast demo{' --full' if full else ''}{'' if per_class is None else f' --per-class {per_class}'}"
    text, files = write_run_report(output, result, command=command)
    say({"rows": result["rows"], "files": files}, as_json, text + "\n\n" + _listing(files))


def _announce(stage: str) -> None:
    typer.echo(f"== {stage}", err=True)


def _listing(files: dict[str, str]) -> str:
    return "\n".join(f"{name:>8}  {path}" for name, path in files.items())


@app.command()
def photos(
    output: Output,
    per_class: Annotated[int, typer.Option(help="Test patches of every class, at most 100.")] = 100,
    severity: Annotated[int, typer.Option(help="1 to 5.")] = 2,
    corruption: Annotated[list[str] | None, typer.Option(help="One of the fifteen [all]; may be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """Write the testbed's test patches, clean and corrupted, as folders laid out like ImageNet-C."""
    from sda_fast.data import CORRUPTIONS
    from sda_fast.photos.testbed import write_testbed

    result = write_testbed(output, per_class, corruption or CORRUPTIONS, severity)
    say(result, as_json, f"{result['images']} patches in {output}.")


@app.command("train-photos")
def train_photos(
    output: Output = Path("runs/photos-weights"),
    model: Annotated[list[str] | None, typer.Option(help="adm, dit, resnet or convnext [all]; repeatable.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps [4000, 8000, 3000, 3000].")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads of this process [all cores].")] = None,
) -> None:
    """Train the testbed's models on its training patches, as the shipped ones were."""
    import torch

    from sda_fast.photos.train import MODELS, STEPS, train_model

    if threads:
        torch.set_num_threads(threads)
    for name in model or MODELS:
        if name not in MODELS:
            raise SdaError(f"--model {name} is not known; choose from {', '.join(MODELS)}")
        wanted = STEPS[name] if steps is None else steps
        path = train_model(name, output, steps=wanted, seed=seed, device=_check_device(device))
        typer.echo(str(path))
