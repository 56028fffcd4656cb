"""All of SDA: synthesize, align, finetune; project the target; evaluate. What `sda-fast run` does."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sda_fast.data import EvaluationCrop, find_images, label_indices, make_reader, read_classes
from sda_fast.engines.classifier import EngineClassifier
from sda_fast.errors import SdaError
from sda_fast.methods import Method, method_class
from sda_fast.models import Classifier, load_classifier
from sda_fast.stages.align import align, check_align
from sda_fast.stages.batches import check_workers
from sda_fast.stages.config import RunConfig
from sda_fast.stages.evaluate import check_scoring, create_methods, evaluate, projections_of
from sda_fast.stages.failures import read_failures
from sda_fast.stages.finetune import MODEL, finetune
from sda_fast.stages.manifest import require_apart
from sda_fast.stages.networks import load_networks, network_files
from sda_fast.stages.ranks import alone
from sda_fast.stages.recipes import Recipe, recipe_for
from sda_fast.stages.synthesize import SynthesizeSettings, check_synthesize, synthesize
from sda_fast.weights import weights_path

UNALIGNED = "SDA, not aligned"  # the ablation's row


@dataclass(frozen=True)
class Stage:
    """One call of a stage. title: what it is announced as; arguments: all that changes what it writes."""

    title: str
    work: Callable[..., Any]
    arguments: dict[str, Any]

    @property
    def output(self) -> Path:
        return Path(self.arguments["output"])


def run(
    config: RunConfig, *, quiet: bool | None = None, log: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Run every stage into `config.output`; returns {"rows", "seconds" by stage, "folders", "models", "failures", ...}.

    "models" holds, by classifier, its weights as "source" and, if it was fine-tuned, as "finetuned"; "failures", by
    the folder of the stage, what could not be read; everything else is done.

    Stages that are finished are skipped and half-finished ones resumed, so the same call goes on after an
    interruption. Raises SdaError as the stages do, as far as possible before the first of them begins.
    """
    alone("run")
    check(config)
    stages = stages_of(config)
    seconds: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for stage in stages:
        log(stage.title)
        started = time.monotonic()
        spread = {"workers": config.workers} if stage.work in (synthesize, align) else {}
        result = stage.work(**stage.arguments, **spread, device=config.device, quiet=quiet)
        seconds[stage.title] = round(time.monotonic() - started, 1)
        if stage.work is evaluate:
            ablated = stage.title.endswith("not aligned")
            rows += [{**row, "method": UNALIGNED} for row in result] if ablated else result
    failures = {str(stage.output): failed for stage in stages if (failed := read_failures(stage.output))}
    projected = {kind: str(folder) for kind, folder in _projected(config).items()}
    tuned = {name: Path(config.output) / "finetuned" / "aligned" / name / MODEL for name in config.classifiers}
    models = {
        name: {"source": path, "finetuned": str(tuned[name]) if adapts(config) else None}
        for name, path in config.classifiers.items()
    }
    return {
        "rows": rows,
        "seconds": seconds,
        "folders": {"target": config.target, **projected},
        "models": models,
        "failures": failures,
        "settings": asdict(config),
    }


def stages_of(config: RunConfig) -> list[Stage]:
    """The stages of a run in their order; what they make lies below `config.output`."""
    root, stages = Path(config.output), []
    methods = list(config.evaluate.methods)
    classifiers = {name: weights_path(path) for name, path in config.classifiers.items()}
    align_all = {"adm": weights_path(config.adm), "preset": config.adm_preset}
    raw, aligned = root / "synthetic" / "raw", root / "synthetic" / "aligned"
    adapted: dict[tuple[str, str], Path] = {}
    if adapts(config):
        stages.append(Stage("synthesize", synthesize, {"output": raw, "exactly": True, **synthesis(config)}))
        both = {"input": raw, "output": aligned, "exactly": True}
        stages.append(Stage("align", align, {**both, "settings": config.align, **align_all}))
        for data in (aligned, raw) if config.evaluate.ablation else (aligned,):
            for name, path in classifiers.items():
                folder = root / "finetuned" / data.name / name
                adapted[data.name, name] = folder / MODEL
                tuning = {"input": data, "output": folder, "model": path, **asdict(config.finetune)}
                stages.append(Stage(f"finetune {name} on {data.name} images", finetune, tuning))
    projected = _projected(config)
    for kind, folder in projected.items():
        both = {"input": Path(config.target), "output": folder}
        settings = config.align if kind == "dda" else config.diffpure
        stages.append(Stage(f"project ({kind})", align, {**both, "settings": settings, **align_all}))

    own = ("mode", "batch_size", "decoder", "resize", "engine", "precision", "seed")
    scoring = {option: getattr(config.evaluate, option) for option in own}
    for name, path in classifiers.items():
        common = {"input": Path(config.target), "model": path, "projections": projected, "name": name, **scoring}
        whole = {"finetuned": adapted.get(("aligned", name)), "methods": methods, "options": config.evaluate.options}
        output = root / "evaluation" / name
        stages.append(Stage(f"evaluate {name}", evaluate, {"output": output, **common, **whole, **_networks(config)}))
        if config.evaluate.ablation and "sda" in methods:
            output = root / "evaluation" / f"{name}-unaligned"
            options = {"sda": config.evaluate.options["sda"]} if "sda" in config.evaluate.options else {}
            other = {"output": output, "finetuned": adapted["raw", name], "methods": ["sda"], "options": options}
            stages.append(Stage(f"evaluate {name}, not aligned", evaluate, {**common, **other}))
    return stages


def adapts(config: RunConfig) -> bool:
    """Whether any method of the run needs a fine-tuned classifier, and with it synthetic images."""
    return any(method_class(name).finetuned for name in config.evaluate.methods)


def synthesis(config: RunConfig) -> dict[str, Any]:
    """The arguments of the run's synthesis, its folder aside."""
    chosen = config.synthesize
    return {
        "dit": weights_path(config.dit),
        "per_class": chosen.per_class,
        "classes": read_classes(chosen.classes) if chosen.classes else None,
        "only": chosen.only or None,
        "settings": SynthesizeSettings(**{f.name: getattr(chosen, f.name) for f in fields(SynthesizeSettings)}),
        "preset": config.dit_preset,
        "vae": config.vae,
    }


def _projected(config: RunConfig) -> dict[str, Path]:
    """The folder of each kind of projection that the methods need."""
    return {kind: Path(config.output) / "projected" / kind for kind in projections_of(config.evaluate.methods)}


def _networks(config: RunConfig) -> dict[str, Any]:
    """The diffusion models that the methods need, as `evaluate` takes them."""
    kinds = {kind for name in config.evaluate.methods for kind in method_class(name).needs}
    if "dit" in kinds and config.vae is not None:
        kinds.add("vae")
    presets = {"adm": config.adm_preset, "dit": config.dit_preset}
    return {
        "networks": {kind: getattr(config, kind) for kind in sorted(kinds)},
        "presets": {kind: name for kind, name in presets.items() if kind in kinds and name is not None},
    }


def check(config: RunConfig) -> None:
    """What a stage would refuse, before the hours of those before it. Raises SdaError as they do; writes nothing."""
    methods = [method_class(name) for name in config.evaluate.methods]
    if not config.classifiers:
        raise SdaError("classifiers is empty: name at least one")
    for name in config.classifiers:
        if name in ("", ".", "..") or {"/", "\0"} & set(name):
            raise SdaError(f"classifiers: {name!r} cannot name a folder: leave out slashes and dots alone")
    require_apart(config.output, config.target, "take results for images", named=("output", "target"))
    for kind, settings in (("dda", config.align), ("diffpure", config.diffpure)):
        if settings.projection != kind:
            table = "align" if kind == "dda" else "diffpure"
            raise SdaError(f"[{table}] projection = {settings.projection!r} must be {kind!r}: remove that line")
    named = ("[evaluate] mode =", "[evaluate] batch_size =")
    check_scoring(config.evaluate.mode, config.evaluate.batch_size, named=named)
    check_workers(config.workers)
    files, _ = find_images(config.target, option="target")
    made: list[str] = []
    if adapts(config):
        _, names = check_synthesize(**synthesis(config), device=config.device)
        made += config.synthesize.only or names
    adm = weights_path(config.adm)
    for kind, settings in (("dda", config.align), ("diffpure", config.diffpure)):
        if any(method.projection == kind or (kind == "dda" and method.finetuned) for method in methods):
            check_align(adm, settings, config.adm_preset, config.device)
    for name, path in config.classifiers.items():
        classifier = load_classifier(weights_path(path))
        recipe_of(config, classifier)
        label_indices(files, classifier.classes)
        if foreign := [label for label in made if label not in classifier.classes]:
            raise SdaError(
                f"class {foreign[0]!r} of DiT {config.dit} is none of {name}'s: give models of the same classes"
            )
        chosen = config.evaluate
        make_reader(chosen.decoder, EvaluationCrop(classifier.input_size, classifier.resize))
        how: Any = (chosen.engine, chosen.precision, chosen.batch_size)
        EngineClassifier(classifier, classifier.input_size, *how).check(config.device)
        methods_of(config, classifier)


def recipe_of(config: RunConfig, classifier: Classifier) -> Recipe:
    """How the run fine-tunes a classifier. Raises SdaError for settings that no recipe has."""
    settings = asdict(config.finetune)
    del settings["seed"]
    return recipe_for(settings.pop("recipe"), classifier.config["architecture"], **settings)


def methods_of(config: RunConfig, classifier: Classifier) -> list[Method]:
    """The run's methods around a classifier, all on the meta device: without weights, to be checked and counted."""
    model, needed = classifier.to("meta"), _networks(config)
    files = network_files(needed["networks"], needed["presets"])
    given = {**load_networks(files, needed["presets"], "meta"), "mode": config.evaluate.mode, "finetuned": model}
    given["seed"] = config.evaluate.seed
    return create_methods(config.evaluate.methods, model, given, config.evaluate.options)
