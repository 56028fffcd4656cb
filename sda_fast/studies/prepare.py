"""What the methods of a study need beforehand, each made once: projections, synthetic images, fine-tuned classifiers.

Folders are those of `sda-fast run`, so what a run or another study made into the same output is used again.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sda_fast.data import list_images
from sda_fast.errors import SdaError
from sda_fast.files import write_json
from sda_fast.stages.align import align
from sda_fast.stages.failures import read_failures, sentence
from sda_fast.stages.finetune import MODEL, finetune
from sda_fast.stages.manifest import MANIFEST
from sda_fast.stages.pipeline import synthesis
from sda_fast.stages.synthesize import synthesize
from sda_fast.studies.config import StudyConfig
from sda_fast.weights import weights_path

SECONDS = "seconds.json"
Log = Callable[[str], None]


def project(config: StudyConfig, kinds: Iterable[str], log: Log, quiet: bool | None) -> dict[str, Path]:
    """The projections of the target by kind; classifiers and methods share them."""
    root = Path(config.output)
    folders = {kind: root / "projected" / kind for kind in sorted(kinds)}
    for kind, folder in folders.items():
        settings = config.align if kind == "dda" else config.diffpure
        _align(config, config.target, folder, settings, f"project ({kind})", log, quiet)
    return folders


def synthetic_images(
    config: StudyConfig, log: Log, quiet: bool | None, cfg_scale: float | None = None, per_class: int | None = None
) -> tuple[Path, Path]:
    """The folders of labelled synthetic images, as sampled and aligned; with another guidance, folders of its own."""
    arguments = synthesis(config)
    if per_class is not None:
        arguments["per_class"] = per_class
    root, stage = Path(config.output) / "synthetic", "synthesize"
    if cfg_scale is not None:
        arguments["settings"] = replace(arguments["settings"], cfg_scale=cfg_scale)
        root, stage = root / f"cfg-{cfg_scale}", f"synthesize (guidance {cfg_scale})"
    raw, aligned = root / "raw", root / "aligned"
    log(stage)
    with _timed(config, stage, config.workers) as made:
        done = synthesize(raw, **arguments, exactly=True, device=config.device, workers=config.workers, quiet=quiet)
        made.append(done["synthesized"])
    _align(config, raw, aligned, config.align, stage.replace("synthesize", "align"), log, quiet, exactly=True)
    return raw, aligned


def first_of_each_class(folder: Path, per_class: int) -> Path:
    """A folder of links to the first `per_class` images of each class below `folder`, beside it.

    Raises SdaError for a class that has fewer.
    """
    by_class: dict[str, list[Path]] = {}
    for file in list_images(folder):
        by_class.setdefault(file.class_name, []).append(file.path)
    subset = folder.with_name(f"{folder.name}-first-{per_class}")
    for name, paths in by_class.items():
        if len(paths) < per_class:
            raise SdaError(f"{folder}/{name} holds {len(paths)} images, not {per_class}: synthesize more")
        (subset / name).mkdir(parents=True, exist_ok=True)
        for path in paths[:per_class]:
            link = subset / name / path.name
            if not link.is_symlink():
                link.symlink_to(os.path.relpath(path, link.parent))
    return subset


def finetuned_models(config: StudyConfig, data: Path, name: str, log: Log, quiet: bool | None) -> dict[str, Path]:
    """Every classifier fine-tuned on a folder of labelled images, under `finetuned/<name>/<classifier>`."""
    models = {}
    for classifier, weights in config.classifiers.items():
        folder, stage = Path(config.output) / "finetuned" / name / classifier, f"finetune {classifier} on {name}"
        begun, models[classifier] = (folder / MANIFEST).exists(), folder / MODEL
        if models[classifier].exists() and begun:
            log(f"{stage}: done")
        else:
            log(stage)
        with _timed(config, stage, 1) as made:
            common: dict[str, Any] = {**asdict(config.finetune), "device": config.device, "quiet": quiet}
            done = finetune(data, folder, weights_path(weights), **common)
            if not begun:  # of a fine-tuning that goes on, the seconds would be a part of all
                made.append(done["images"])
    return models


def seconds_per_stage(config: StudyConfig) -> dict[str, dict[str, float]]:
    """By stage, what it has taken so far: seconds of one process (those of several added up), and images made."""
    try:
        return json.loads((Path(config.output) / SECONDS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def _align(
    config: StudyConfig,
    source: str | Path,
    folder: Path,
    settings: Any,
    stage: str,
    log: Log,
    quiet: bool | None,
    exactly: bool = False,
) -> None:
    log(stage)
    adm = weights_path(config.adm)
    with _timed(config, stage, config.workers) as made:
        done = align(
            source,
            folder,
            adm,
            settings,
            preset=config.adm_preset,
            exactly=exactly,
            device=config.device,
            workers=config.workers,
            quiet=quiet,
        )
        made.append(done["projected"])
    if failures := read_failures(folder):
        raise SdaError(f"a study shows every method the same images: {sentence(folder, failures)}")


@contextmanager
def _timed(config: StudyConfig, stage: str, workers: int) -> Iterator[list[int]]:
    """Adds what the block takes to the stage's seconds; the block appends how many images it made."""
    made: list[int] = []
    begun = time.monotonic()
    yield made
    seconds = (time.monotonic() - begun) * workers
    if sum(made):
        times = seconds_per_stage(config)
        # What is done again replaces what it took before, unlike images that are added to a folder.
        again = stage.startswith("finetune")
        before = {"seconds": 0.0, "images": 0} if again else times.get(stage, {"seconds": 0.0, "images": 0})
        times[stage] = {
            "seconds": round(before["seconds"] + seconds, 2),
            "images": before["images"] + sum(made),
        }
        write_json(times, Path(config.output) / SECONDS)
