"""What `sda-fast run --dry-run` says: every stage of a run, what is done of it, and what the rest will cost.

Nothing is computed or written. FLOPs are counted on the networks' graphs without weights, a multiplication and an
addition apart; time is those FLOPs at a rate somebody measured, and so an estimate.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sda_fast.bench.models import PRESETS, architecture, fake_step
from sda_fast.data import ImageFile, find_images
from sda_fast.diffusion import Schedule
from sda_fast.engines.ledger import flops
from sda_fast.errors import SdaError
from sda_fast.models import ADM, Classifier, DiT, load_classifier
from sda_fast.models.vae import load_vae, vae_file
from sda_fast.report.tables import Cell, Table
from sda_fast.stages.align import SURPLUS, align, align_record, check_align, norm_groups, projection_done
from sda_fast.stages.config import RunConfig
from sda_fast.stages.evaluate import images_kept, projections_of
from sda_fast.stages.finetune import MODEL, finetune
from sda_fast.stages.manifest import MANIFEST, check_output
from sda_fast.stages.pipeline import Stage, check, methods_of, recipe_of, stages_of
from sda_fast.stages.synthesize import OTHERS, check_synthesize, synthesize, synthesize_record, synthetic_keys

BACKWARD = 2  # a backward pass for weights and inputs, in forward passes


@dataclass(frozen=True)
class Planned:
    """A stage of a run. images: all it handles (a fine-tuning: in all its epochs); done: those that are finished.

    flops and bytes: of what is left, `bytes` at most (images as if PNG saved nothing). seconds: those FLOPs at a
    measured rate, None where there is none; basis: which rate.
    """

    stage: str
    reads: str
    writes: str
    images: int
    done: int
    flops: int
    bytes: int
    seconds: float | None
    basis: str


class Rates:
    """Measured speeds: one given by hand for everything, or the rows that `sda-fast bench --output` wrote."""

    def __init__(self, tflop_per_s: float | None = None, rows: str | Path | None = None):
        """tflop_per_s: of one process. Raises SdaError for both at once, and for what is no rate and no such file."""
        if tflop_per_s is not None and rows is not None:
            raise SdaError("--rate and --rows exclude each other: give one of them")
        if tflop_per_s is not None and not 0 < tflop_per_s < float("inf"):
            raise SdaError(f"--rate {tflop_per_s} is out of range: give the TFLOP/s of one process, above 0")
        self._given = tflop_per_s
        self._rows = [] if rows is None else _read_rows(Path(rows))

    def of(self, step: str, model: ADM | DiT | None, settings: Any) -> tuple[float | None, str]:
        """TFLOP/s of a step of a model on the settings' engine, and where that is from; of the latest row that fits."""
        if self._given is not None:
            return self._given, f"--rate {self._given:g} TFLOP/s"
        if model is None:
            return None, "a classifier, of which bench measures nothing"
        wanted = {"step": step, "engine": settings.engine, "precision": settings.precision}
        changed = {name: getattr(settings, name, False) for name in ("phase_convolutions", "winograd")}
        kinds = "".join(f", {name.replace('_', ' ')}" for name, chosen in changed.items() if chosen)
        for row in reversed(self._rows):
            same = all(row.get(name, False) == chosen for name, chosen in changed.items())
            if same and wanted.items() <= row.items() and row["preset"] in PRESETS:
                kind, config = architecture(row["preset"])
                if isinstance(model, kind) and _plain(config) == _plain(model.config):
                    threads = "" if row.get("cuda") else f", {row['threads']} thread(s)"
                    how = f"{step} on {row['engine']} in {row['precision']}{kinds}, batch {row['batch']}"
                    return row["tflop_per_s"], f"{row['tflop_per_s']:.4g} TFLOP/s, {how}, {row['device']}{threads}"
        return None, f"{step} of this network on {settings.engine} in {settings.precision}{kinds}, of which no row is"


def dry_run(config: RunConfig, rates: Rates) -> list[Planned]:
    """The plan of a run. Raises SdaError for what `pipeline.run` would refuse, as far as that can be known by now."""
    check(config)
    target = Path(config.target)
    made = {target: [file.key for file in find_images(target)[0]]}  # the keys that each folder holds, or will hold
    planned = []
    for stage in stages_of(config):
        if stage.work is synthesize:
            planned.append(_plan_synthesize(stage, config, rates, made))
        elif stage.work is align:
            planned.append(_plan_align(stage, config, rates, made))
        elif stage.work is finetune:
            planned.append(_plan_finetune(stage, config, rates, made))
        else:
            planned.append(_plan_evaluate(stage, config, rates, len(made[target])))
    return planned


def _plan_synthesize(stage: Stage, config: RunConfig, rates: Rates, made: dict[Path, list[str]]) -> Planned:
    arguments = {name: value for name, value in stage.arguments.items() if name not in ("output", "exactly")}
    settings, dit = arguments["settings"], arguments["dit"]
    vae = None if config.vae is None else vae_file(config.vae)
    model, names = check_synthesize(**arguments, device=config.device)
    out = check_output(stage.output, "synthesize", lambda: synthesize_record(dit, vae, settings, names))
    keys = made[stage.output] = synthetic_keys(arguments["only"] or names, arguments["per_class"])
    out.require_no_others(keys, OTHERS)
    latent, side = (1, model.in_channels, model.input_size, model.input_size), model.input_size
    passes = len(Schedule.linear(settings.respacing)) * (1 if settings.cfg_scale == 1.0 else 2)
    each = passes * _step_flops(model)
    if vae is not None:
        decode = load_vae(vae).to("meta").decode
        each += flops(decode, torch.empty(latent, device="meta"))
        side = decode(torch.empty(latent, device="meta")).shape[-1]
    rate = rates.of("DiTStep", model, settings)
    return _images(stage, "the DiT", keys, out.done, each, side, rate, config.workers)


def _plan_align(stage: Stage, config: RunConfig, rates: Rates, made: dict[Path, list[str]]) -> Planned:
    folder, adm, preset = stage.arguments["input"], stage.arguments["adm"], stage.arguments["preset"]
    settings = stage.arguments["settings"].resolved()
    model = check_align(adm, settings, preset, config.device)

    def record() -> dict[str, Any] | None:
        if folder != Path(config.target) and not (folder / MANIFEST).exists():
            return None  # what its manifest will say is not known yet
        return align_record(folder, adm, settings, model.image_size)

    out = check_output(stage.output, "align", record)
    keys = made[stage.output] = made[folder]
    if stage.arguments.get("exactly"):
        out.require_no_others(keys, SURPLUS)
    target = folder == Path(config.target)
    files = find_images(folder)[0] if target else [ImageFile(folder, f"{key}.png") for key in keys]
    done = projection_done(out, norm_groups(files, settings), settings)
    guided = settings.projection == "dda" and not settings.jacobian_free
    rate = rates.of("GuidedStep" if guided else "UnguidedStep", model, settings)
    each = settings.start * _step_flops(model, guided)
    return _images(stage, str(folder), keys, done, each, model.image_size, rate, config.workers)


def _plan_finetune(stage: Stage, config: RunConfig, rates: Rates, made: dict[Path, list[str]]) -> Planned:
    check_output(stage.output, "finetune", lambda: None)
    classifier = load_classifier(stage.arguments["model"]).to("meta")
    images = recipe_of(config, classifier).last_epoch * len(made[stage.arguments["input"]])
    finished = (stage.output / MODEL).exists()
    left = 0 if finished else images * (1 + BACKWARD) * _classifier_flops(classifier)
    size = 0 if finished else sum(4 * parameter.numel() for parameter in classifier.parameters())
    return _planned(
        stage, str(stage.arguments["input"]), images, images * finished, left, size, rates.of("", None, None)
    )


def _plan_evaluate(stage: Stage, config: RunConfig, rates: Rates, images: int) -> Planned:
    out = check_output(stage.output, "evaluate", lambda: None)
    classifier = load_classifier(stage.arguments["model"])
    methods = dict(zip(config.evaluate.methods, methods_of(config, classifier), strict=True))
    forward, each = _classifier_flops(classifier), 0
    for method in (methods[name] for name in stage.arguments["methods"]):
        cost = method.cost()
        each += (cost.classifier + BACKWARD * cost.classifier_backward) * forward
        if network := getattr(method, "adm", None) or getattr(method, "dit", None):
            each += (cost.diffusion + BACKWARD * cost.diffusion_backward) * _step_flops(network, guided=False)
    folders = stage.arguments["projections"]
    made = [kind for kind in projections_of(stage.arguments["methods"]) if (folders[kind] / MANIFEST).exists()]
    files = find_images(config.target)[0]
    # A projection that is missing will be made before, with its image's time: the image stands for it.
    pairs = {kind: {file.key: file for file in [*files, *find_images(folders[kind])[0]]} for kind in made}
    done = images_kept(out.folder, files, pairs)
    left = images - done
    reads = ", ".join(str(folder) for folder in (config.target, *stage.arguments["projections"].values()))
    size = 2 * left * len(stage.arguments["methods"])  # an outcome is one character, in two files
    return _planned(stage, reads, images, done, left * each, size, rates.of("", None, None))


def _images(
    stage: Stage,
    reads: str,
    keys: list[str],
    finished: Callable[[str], bool],
    each: int,
    side: int,
    rate: tuple[float | None, str],
    workers: int,
) -> Planned:
    """Of a stage that writes one PNG of `side` x `side` pixels for each key, at a cost of `each` FLOPs."""
    done = sum(map(finished, keys))
    left = len(keys) - done
    return _planned(stage, reads, len(keys), done, left * each, left * 3 * side**2, rate, workers)


def _planned(
    stage: Stage,
    reads: str,
    images: int,
    done: int,
    left: int,
    size: int,
    rate: tuple[float | None, str],
    workers: int = 1,
) -> Planned:
    per_second, basis = rate
    seconds = None if per_second is None else left / (per_second * 1e12) / workers
    return Planned(stage.title, reads, str(stage.output), images, done, left, size, seconds, basis)


_counted: dict[str, int] = {}


def _step_flops(model: ADM | DiT, guided: bool = True) -> int:
    """Of one step for one image; `guided`: of an ADM, with the low-pass gradient back through it."""
    guided = guided and isinstance(model, ADM)
    key = json.dumps([type(model).__name__, model.config, guided])
    if key not in _counted:
        with fake_step(type(model), model.config, "fp32", 1, guided=guided) as (step, example):
            _counted[key] = flops(step, *example)
    return _counted[key]


def _classifier_flops(classifier: Classifier) -> int:
    size = classifier.input_size
    return flops(classifier.to("meta"), torch.empty(1, 3, size, size, device="meta"))


def plan_table(planned: list[Planned], config: RunConfig) -> Table:
    """The plan for people, with folders relative to the run's; its records for programs."""
    lines = []
    for row in planned:
        reads, writes = (folders.replace(f"{Path(config.output)}/", "") for folders in (row.reads, row.writes))
        left = (_tflop(row.flops), _duration(row.seconds), _size(row.bytes))
        lines.append((row.stage, reads, writes, str(row.images), str(row.done), *left))
    known = [row.seconds for row in planned if row.seconds is not None]
    time = _duration(sum(known)) + (" + ?" if len(known) < len(planned) else "") if known else "?"
    counts = ("images", "done", "flops", "bytes")
    images, done, work, size = (sum(getattr(row, name) for row in planned) for name in counts)
    lines.append(("all", "", "", str(images), str(done), _tflop(work), time, _size(size)))
    return Table(
        f"What the run would do in {config.output}",
        ("stage", "reads", "writes", "images", "done", "TFLOP left", "time left", "disk"),
        tuple(tuple(map(Cell, line)) for line in lines),
        tuple(asdict(row) for row in planned),
        text_columns=3,
        summary_rows=1,
        note=_note(planned, config, size),
    )


def _note(planned: list[Planned], config: RunConfig, size: int) -> str:
    free = free_bytes(config.output)
    bases, missing = ({r.basis: None for r in planned if (r.seconds is None) == no} for no in (False, True))
    if bases:
        how = f"those FLOPs at {'; '.join(bases)}; {config.workers} worker(s)"
        time = f"Time is an estimate: {how}; reading, writing and compilation left out."
        time += f" Without a rate: {'; '.join(missing)}." if missing else ""
    else:
        time = "No time is estimated: give --rate TFLOP/s of one process, or --rows with fitting rows of bench."
    return (
        "Images of a fine-tuning are those of all its epochs. FLOPs are counted on the networks, a backward pass of a "
        f"classifier as two forward ones. {time} Disk is at most, PNGs as large as their pixels; {_size(free)} are "
        f"free{', WHICH IS NOT ENOUGH' if size > free else ''}. Nothing was started or written."
    )


def free_bytes(folder: str | Path) -> int:
    """Free space where a folder is or would be."""
    path = Path(folder).absolute()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def _tflop(count: int) -> str:
    return f"{count / 1e12:,.3g}" if count < 1e14 else f"{count / 1e12:,.0f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    for unit, length in (("days", 48 * 3600), ("h", 5400), ("min", 120)):
        if seconds >= length:
            return f"{seconds / {'days': 86400, 'h': 3600, 'min': 60}[unit]:.1f} {unit}"
    return f"{seconds:.0f} s"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The measured steps in a file of rows, the latest last."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        steps = [row for row in rows if row.get("benchmark") == "step" and "tflop_per_s" in row]
    except OSError as error:
        raise SdaError(f"--rows {path} cannot be read ({error.strerror}): give a file of sda-fast bench") from error
    except (ValueError, AttributeError) as error:
        raise SdaError(f"--rows {path} holds no rows of sda-fast bench ({error}): give a file it wrote") from error
    if not steps:
        raise SdaError(f"--rows {path} holds no measured step: sda-fast bench --output {path} adds one")
    return steps


def _plain(config: Mapping[str, Any]) -> Any:
    """As it comes back from JSON, lists in place of tuples."""
    return json.loads(json.dumps(dict(config)))
