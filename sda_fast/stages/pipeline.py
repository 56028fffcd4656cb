"""All of SDA: synthesize, align, finetune; project the target; evaluate. What `sda-fast run` does."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from sda_fast.data import find_images, label_indices
from sda_fast.errors import SdaError
from sda_fast.methods import method_class
from sda_fast.methods.ensembles import MODES
from sda_fast.models import load_classifier
from sda_fast.stages.align import align
from sda_fast.stages.config import RunConfig
from sda_fast.stages.evaluate import evaluate
from sda_fast.stages.failures import read_failures
from sda_fast.stages.finetune import MODEL, finetune
from sda_fast.stages.ranks import alone
from sda_fast.stages.recipes import recipe_for
from sda_fast.stages.synthesize import SynthesizeSettings, synthesize
from sda_fast.weights import weights_path

UNALIGNED = "SDA, not aligned"  # the ablation's row


def run(
    config: RunConfig, *, quiet: bool | None = None, log: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Run every stage into `config.output`; returns {"rows", "seconds" by stage, "folders", "models", "failures", ...}.

    "models" holds, by classifier, its weights as "source" and, if it was fine-tuned, as "finetuned"; "failures", by
    the folder of the stage, what could not be read; everything else is done.

    Stages that are finished are skipped and half-finished ones resumed, so the same call goes on after an
    interruption. Raises SdaError as the stages do.
    """
    alone("run")
    root = Path(config.output)
    methods = {name: method_class(name) for name in config.evaluate.methods}
    kinds = sorted({m.projection for m in methods.values() if m.projection})
    adapts = any(m.finetuned for m in methods.values())
    adm, dit = weights_path(config.adm), weights_path(config.dit)
    classifiers = {name: weights_path(path) for name, path in config.classifiers.items()}
    _check(config)
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        log(stage)
        started = time.monotonic()
        yield
        seconds[stage] = round(time.monotonic() - started, 1)

    common: dict[str, Any] = {"device": config.device, "quiet": quiet}
    spread: dict[str, Any] = {**common, "workers": config.workers}
    raw, aligned = root / "synthetic" / "raw", root / "synthetic" / "aligned"
    adapted: dict[tuple[str, str], Path] = {}
    if adapts:
        named = {f.name: getattr(config.synthesize, f.name) for f in fields(SynthesizeSettings)}
        settings = SynthesizeSettings(**named)
        with timed("synthesize"):
            loading: dict[str, Any] = {"preset": config.dit_preset, "vae": config.vae, **spread}
            synthesize(raw, dit, config.synthesize.per_class, settings=settings, **loading)
        with timed("align"):
            align(raw, aligned, adm, config.align, preset=config.adm_preset, **spread)
        for data in (aligned, raw) if config.evaluate.ablation else (aligned,):
            for name, path in classifiers.items():
                folder = root / "finetuned" / data.name / name
                adapted[data.name, name] = folder / MODEL
                with timed(f"finetune {name} on {data.name} images"):
                    finetune(data, folder, path, config.finetune.recipe, seed=config.finetune.seed, **common)

    projected = {kind: root / "projected" / kind for kind in kinds}
    for kind, folder in projected.items():
        chosen = config.align if kind == "dda" else config.diffpure
        with timed(f"project ({kind})"):
            align(config.target, folder, adm, chosen, preset=config.adm_preset, **spread)

    rows: list[dict[str, Any]] = []
    own = ("mode", "batch_size", "decoder", "resize")
    scoring: dict[str, Any] = {**{option: getattr(config.evaluate, option) for option in own}, **common}
    for name, path in classifiers.items():
        with timed(f"evaluate {name}"):
            model = adapted.get(("aligned", name))
            folder = root / "evaluation" / name
            rows += evaluate(config.target, folder, path, model, projected, list(methods), name=name, **scoring)
        if config.evaluate.ablation and "sda" in methods:
            with timed(f"evaluate {name}, not aligned"):
                model = adapted["raw", name]
                folder = root / "evaluation" / f"{name}-unaligned"
                extra = evaluate(config.target, folder, path, model, projected, ["sda"], name=name, **scoring)
            rows += [{**row, "method": UNALIGNED} for row in extra]
    stages = [
        *([aligned] if adapts else []),
        *projected.values(),
        *(root / "evaluation" / name for name in classifiers),
    ]
    failures = {str(folder): failed for folder in stages if (failed := read_failures(folder))}
    folders = {"target": config.target, **{kind: str(folder) for kind, folder in projected.items()}}
    tuned = {name: str(file) for (images, name), file in adapted.items() if images == aligned.name}
    models = {name: {"source": path, "finetuned": tuned.get(name)} for name, path in config.classifiers.items()}
    return {
        "rows": rows,
        "seconds": seconds,
        "folders": folders,
        "models": models,
        "failures": failures,
        "settings": asdict(config),
    }


def _check(config: RunConfig) -> None:
    """What a later stage would refuse, before the hours of the earlier ones."""
    if not config.classifiers:
        raise SdaError("classifiers is empty: name at least one")
    for kind, settings in (("dda", config.align), ("diffpure", config.diffpure)):
        if settings.projection != kind:
            table = "align" if kind == "dda" else "diffpure"
            raise SdaError(f"[{table}] projection = {settings.projection!r} must be {kind!r}: remove that line")
    if config.evaluate.mode not in MODES:
        raise SdaError(f"[evaluate] mode = {config.evaluate.mode!r} is not known; choose one of {', '.join(MODES)}")
    if config.evaluate.batch_size < 1:
        raise SdaError(f"[evaluate] batch_size = {config.evaluate.batch_size} is out of range: give at least 1")
    recipe_for(config.finetune.recipe, "")
    files, _ = find_images(config.target, option="target")
    for path in config.classifiers.values():
        label_indices(files, load_classifier(weights_path(path)).classes)
