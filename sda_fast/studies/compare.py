"""The study "compare": methods x classifiers x corruptions, under every stream (paper, tables 1, 2, 3 and 8)."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sda_fast.errors import SdaError
from sda_fast.methods import method_class
from sda_fast.models import load_classifier
from sda_fast.stages.pipeline import check as check_run
from sda_fast.stages.ranks import alone
from sda_fast.statistics import Row
from sda_fast.studies.config import StudyConfig, chosen_methods, chosen_streams
from sda_fast.studies.contenders import Contender, examined, options_of
from sda_fast.studies.prepare import Log, finetuned_models, project, seconds_per_stage, synthetic_images
from sda_fast.studies.scoring import corrupted_groups, score
from sda_fast.studies.streams import ANY
from sda_fast.weights import weights_path


@dataclass(frozen=True)
class Result:
    """What a study found. rows: see `score`; seconds: by stage, see `seconds_per_stage`; settings: of the study.

    usual: the stream that a method which learns from its stream is shown in the tables that tell no streams apart.
    pretraining: seconds that training the classifiers took, where the files beside their weights say so.
    """

    study: str
    rows: list[Row]
    seconds: dict[str, dict[str, float]]
    settings: dict[str, Any]
    usual: str
    pretraining: dict[str, float]


def compare(config: StudyConfig, *, quiet: bool | None = None, log: Log = lambda line: None) -> Result:
    """Compare methods under `<output>/compare/`, making what they need first; the same call goes on.

    Projections are shared by methods and classifiers. Without `config.finetuned`, models are fine-tuned on aligned
    synthetic images where a method asks for them. Raises SdaError as `score` and the stages do.
    """
    alone("compare")
    methods, streams = chosen_methods(config.compare), chosen_streams(config.compare)
    check(config, methods)
    contenders = examined(
        config,
        [
            Contender(method_class(name).title, name, name, model, options_of(config, name))
            for model in config.classifiers
            for name in methods
        ],
    )
    kinds = [method_class(name) for name in methods]
    projections = project(config, {kind.projection for kind in kinds if kind.projection}, log, quiet)
    if any(kind.finetuned for kind in kinds):
        models = _finetuned(config, log, quiet)
        contenders = [
            replace(c, finetuned=models[c.model]) if method_class(c.method).finetuned else c for c in contenders
        ]
    log("compare")
    rows = score(config, "compare", contenders, projections, streams, quiet)
    return result(config, "compare", rows, str(streams[0]))


def result(config: StudyConfig, study: str, rows: list[Row], usual: str) -> Result:
    """The rows with what else a study reports."""
    seconds = seconds_per_stage(config)
    return Result(study, rows, seconds, asdict(config), usual, _pretraining(config))


def check(config: StudyConfig, methods: Sequence[str]) -> None:
    """What a later stage would refuse, before the hours of the earlier ones."""
    for name, path in config.finetuned.items():
        if name not in config.classifiers:
            raise SdaError(f"finetuned: {name!r} is no classifier of this study; known are {list(config.classifiers)}")
        source = load_classifier(weights_path(config.classifiers[name]))
        if load_classifier(weights_path(path)).classes != source.classes:
            raise SdaError(f"finetuned: {path} has other classes than {name}: fine-tune that one")
    if config.finetuned.keys() >= config.classifiers.keys():  # then nothing is synthesised
        methods = [name for name in methods if not method_class(name).finetuned]
    options = {name: found for name in methods if (found := options_of(config, name))}
    check_run(replace(config, evaluate=replace(config.evaluate, methods=tuple(methods), options=options)))
    corrupted_groups(config)


def _finetuned(config: StudyConfig, log: Log, quiet: bool | None) -> dict[str, Path]:
    models = {name: weights_path(path) for name, path in config.finetuned.items()}
    if missing := {name: path for name, path in config.classifiers.items() if name not in models}:
        _, aligned = synthetic_images(config, log, quiet)
        models |= finetuned_models(replace(config, classifiers=missing), aligned, "aligned", log, quiet)
    return models


def _pretraining(config: StudyConfig) -> dict[str, float]:
    """Seconds from the files that `train-photos` writes beside weights."""
    seconds = {}
    for name, weights in config.classifiers.items():
        try:
            seconds[name] = float(json.loads(weights_path(weights).with_suffix(".json").read_text())["seconds"])
        except (OSError, ValueError, KeyError, TypeError):  # other weights come without such a file
            continue
    return seconds


def of_usual_stream(rows: Sequence[Row], usual: str) -> list[Row]:
    """One row for each method, model and corruption: those that hold for any stream, and those of the usual one.

    None says its stream any more: tables take them for one.
    """
    return [{**row, "stream": ANY} for row in rows if row["stream"] in (ANY, usual)]
