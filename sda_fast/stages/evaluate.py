"""Stage "evaluate": the accuracy of every method on a folder of labelled images and their projections."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sda_fast.data import (
    EvaluationCrop,
    ImageFile,
    Prefetcher,
    below_condition,
    by_condition,
    condition_of,
    describe,
    find_images,
    identity,
    label_indices,
    make_reader,
    pair,
    reading_threads,
    shown,
    to_unit,
)
from sda_fast.data.readers import Cropped, Reader
from sda_fast.engines import Precision
from sda_fast.engines.classifier import EngineClassifier
from sda_fast.errors import SdaError
from sda_fast.files import write_json
from sda_fast.methods import METHODS, create_from, method_class, revisions
from sda_fast.methods.base import Method, predictions
from sda_fast.methods.ensembles import MODES
from sda_fast.models import Classifier, load_classifier
from sda_fast.numerics import plain_float32
from sda_fast.stages.failures import Failures, read_failures, report_listing, write_failures
from sda_fast.stages.manifest import file_sha256, made_with, open_output
from sda_fast.stages.networks import load_networks, network_files
from sda_fast.stages.progress import progress
from sda_fast.stages.ranks import alone
from sda_fast.stages.sources import Sources
from sda_fast.statistics import make_row

RESULTS = "results.json"
Pairs = Mapping[str, Mapping[str, ImageFile]]  # by kind of projection and key


def evaluate(
    input: str | Path,
    output: str | Path,
    model: str | Path,
    finetuned: str | Path | None = None,
    projections: Mapping[str, str | Path] | None = None,
    methods: Sequence[str] | None = None,
    *,
    name: str | None = None,
    networks: Mapping[str, str | Path] | None = None,
    presets: Mapping[str, str] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    mode: str = "sum",
    seed: int = 0,
    batch_size: int = 64,
    decoder: str = "pillow",
    resize: bool = True,
    engine: str = "eager",
    precision: Precision = "fp32",
    device: str = "cpu",
    quiet: bool | None = None,
) -> list[dict[str, Any]]:
    """Score methods on the images below `input` and write `<output>/results.json`; returns its rows.

    input: `[<corruption>/[<severity>/]]<class>/<file>`; a subset of classes may be present. projections: folder by
    kind ("dda", "diffpure"), mirroring `input`. methods: by default all whose needs are met, without those that take
    their time (`Method.on_request`). name: of the classifier in tables, by default its file's. Labels go by folder
    name, pairs by relative path. Every corruption's result is kept as it is made, so an interrupted run goes on; one
    whose images or projections have changed since is made anew. decoder: how images are read, see
    `sda_fast.data.readers`.

    networks: files of the diffusion models that methods ask for, by kind ("adm", "dit", "vae"); presets: what
    published ones are called, by kind. options: by method, what its class takes. Methods that learn from the images
    they see do so in the order of the relative paths, which goes class by class, in batches of `batch_size`, and are
    reset before each corruption. seed: the key of what is random in a method, beside an image's path.

    resize: whether images are enlarged as the classifier's evaluation does, the short side to 256 before a crop of 224;
    if not, the short side goes straight to the crop, which leaves ImageNet-C's images of 224 pixels as they are.

    engine, precision: how classifiers run in methods that only look at what they say; methods that go back through
    them, or change them, run the module in float32.

    An image that cannot be read, or whose projection is missing or cannot be read, counts for no method; it stands in
    `<output>/failures.json`, as do projections without an original. A later call tries again.

    Each row holds method, model, corruption, severity, images, correct, accuracy and its 95 % interval, and
    `outcomes`: 1 or 0 per image in the order of the relative paths. Raises SdaError for folders that do not belong
    together, unknown classes, wrong weights and other settings than those of a run begun before.
    """
    alone("evaluate")
    check_scoring(mode, batch_size)
    files, listed = find_images(input)
    failures = report_listing(listed)
    found = len(files) + sum(not name.endswith("/") for name in listed)
    source = load_classifier(model)
    adapted = load_classifier(finetuned) if finetuned else None
    if adapted is not None and adapted.classes != source.classes:
        raise SdaError(f"{finetuned} has other classes than {model}: fine-tune the model you evaluate")
    labels = dict(zip([file.key for file in files], label_indices(files, source.classes), strict=True))
    folders = dict(projections or {})
    chosen = _choose(methods, folders, adapted is not None, networks or {})
    options, presets, network = options or {}, presets or {}, network_files(networks or {}, presets or {})
    given: dict[str, Any] = {**load_networks(network, presets, device), "mode": mode, "seed": seed}
    source = source.to(device)
    plain = (engine, precision) == ("eager", "fp32")

    def quick(classifier: Classifier) -> nn.Module:
        if plain:
            return classifier
        running = EngineClassifier(classifier, classifier.input_size, engine, precision, batch_size)
        running.check(device)
        return running

    given["finetuned"] = adapted and quick(adapted.to(device))
    created = create_methods(chosen, source, given, options, quick(source))
    pairs = {kind: _pairs(files, folders[kind], kind, failures) for kind in projections_of(chosen)}
    crop = EvaluationCrop(source.input_size, source.resize if resize else source.input_size)
    reader = make_reader(decoder, crop, reading_threads(1))

    weights = {"model": file_sha256(model), "finetuned": file_sha256(finetuned) if finetuned else None}
    settings = {
        "input": str(Path(input).resolve()),
        "input_made_with": made_with(input),
        "projections": {kind: str(Path(folders[kind]).resolve()) for kind in pairs},
        "projections_made_with": {kind: made_with(folders[kind]) for kind in pairs},
        "methods": chosen,
        "networks": {kind: file_sha256(file) for kind, file in network.items()},
        "options": {name: dict(values) for name, values in options.items()},
        "revisions": revisions(chosen),
        "mode": mode,
        "seed": seed,
        "batch_size": batch_size,
        "decoder": decoder,
        "resize": resize,
        "engine": engine,
        "precision": precision,
        "weights": weights,
    }
    out = open_output(output, "evaluate", settings)
    name = name or Path(model).stem
    rows: list[dict[str, Any]] = []
    with progress(len(files), f"evaluating {name}", quiet) as reporter:
        for group, members in by_condition(files).items():
            kept = _rows_file(out.folder, group)
            corruption, severity = describe(group, input)
            sources = sources_of(members, pairs.values())
            if (earlier := _kept(kept, members, sources)) is not None:
                rows += [{**row, "corruption": corruption, "severity": severity} for row in earlier]
                reporter.skip(len(members))
                continue
            made_of = sources.now
            usable = [file for file in members if file.name not in failures]
            for method in created:
                method.reset()
            outcomes, unreadable = _outcomes(
                created, usable, labels, pairs, reader, batch_size, device, reporter.advance
            )
            failures.update(unreadable)
            seen = [below_condition(file) for file in usable if file.name not in unreadable]
            group_rows = [
                make_row(method.title, name, corruption, severity, correct, seen)
                for method, correct in zip(created, outcomes, strict=True)
                if seen
            ]
            if not any(condition_of(failed) == group for failed in failures):
                names = [member.name for member in members]
                write_json({"images": names, **made_of._asdict(), "rows": group_rows}, kept)
            rows += group_rows
    write_json({"settings": settings, "rows": rows}, out.folder / RESULTS)
    write_failures(out.folder, failures)
    out.finish({"images": found, "rows": len(rows), "failed": len(failures)})
    return rows


def images_kept(output: Path, files: Sequence[ImageFile], pairs: Pairs) -> int:
    """For how many of the images an earlier run into `output` kept rows that a further one takes."""
    groups = by_condition(files)

    def is_kept(group: str) -> bool:
        sources = sources_of(groups[group], pairs.values())
        return _kept(_rows_file(output, group), groups[group], sources) is not None

    return sum(len(groups[group]) for group in groups if is_kept(group))


def _rows_file(output: Path, group: str) -> Path:
    return output / "rows" / f"{group or 'all'}.json"


def _kept(path: Path, files: Sequence[ImageFile], sources: Sources) -> list[dict[str, Any]] | None:
    """The rows an earlier run kept of these very images, as they are now."""
    try:
        kept = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # or damaged: made anew
        return None
    if not isinstance(kept, dict) or "rows" not in kept or kept.get("images") != [file.name for file in files]:
        return None
    mtime_ns = kept.get("mtime_ns", os.stat(path).st_mtime_ns)
    return kept["rows"] if sources.made(mtime_ns, lambda: kept.get("sha256")) else None


def sources_of(files: Sequence[ImageFile], projections: Iterable[Mapping[str, ImageFile]]) -> Sources:
    """What rows of images are made of: they and, as far as there are some, their projections by key."""
    projected = [by_key[file.key].path for by_key in projections for file in files if file.key in by_key]
    return Sources([file.path for file in files] + projected, reading_threads(1) if len(files) > 1 else 1)


def _choose(
    methods: Sequence[str] | None, folders: Mapping[str, Any], finetuned: bool, networks: Mapping[str, Any]
) -> list[str]:
    def lack(name: str) -> str | None:
        kind = method_class(name)
        for network in kind.needs:
            if network not in networks:
                return f"a diffusion model of kind {network}: give --network {network}=FILE"
        if kind.projection and kind.projection not in folders:
            return f"the {kind.projection} projections: give --projection {kind.projection}=FOLDER"
        return "a fine-tuned model: give --finetuned FILE" if kind.finetuned and not finetuned else None

    if methods is None:
        return [name for name in METHODS if lack(name) is None and not method_class(name).on_request]
    for name in methods:
        if reason := lack(name):
            raise SdaError(f"method {name} needs {reason}")
    return list(dict.fromkeys(methods))


def projections_of(methods: Sequence[str]) -> list[str]:
    """The kinds of projections that methods need."""
    return sorted({kind for name in methods if (kind := method_class(name).projection)})


def _pairs(files: Sequence[ImageFile], folder: str | Path, kind: str, failures: Failures) -> dict[str, ImageFile]:
    """The projection of each image by key; images without one are added to `failures`.

    Further projections are passed over: a part of a test set is evaluated with the projections of all of it.
    """
    option = f"--projection {kind}="
    projected, listed = find_images(folder, option)
    made = (made_with(folder) or {}).get("projection", kind)
    if made != kind:
        raise SdaError(f"--projection {kind}={folder} holds {made} projections: give it as {made}={folder}")
    by_key, left_out = {file.key: file for file in projected}, read_failures(folder)
    originals = {file.key for file in files}
    if not originals & by_key.keys():
        pair(files, projected)  # another folder altogether: says so
    where = f"{option}{shown(str(folder))}"
    for name, rest in listed.items():
        failures[f"{option}{name}"] = f"{shown(name)} in {where} {rest}."
    for file in files:
        if file.key not in by_key:
            why = f", which left it out: {left_out[file.name]}" if file.name in left_out else ": align it first."
            failures.setdefault(file.name, f"{shown(file.name)} has no projection in {where}{why}")
    return by_key


def check_scoring(mode: str, batch_size: int, *, named: tuple[str, str] = ("--ensemble", "--batch-size")) -> None:
    """Raises SdaError for settings that are out of range; `named` is what it calls the two."""
    if mode not in MODES:
        raise SdaError(f"{named[0]} {mode!r} is not known; choose one of {', '.join(MODES)}")
    if batch_size < 1:
        raise SdaError(f"{named[1]} {batch_size} is out of range: give at least 1")


def create_methods(
    names: Sequence[str],
    source: Classifier,
    given: Mapping[str, Any],
    options: Mapping[str, Mapping[str, Any]],
    quick: nn.Module | None = None,
) -> list[Method]:
    """Methods with as much of what is given as their classes take, and each with its own options.

    quick: takes the place of `source` in methods that do not differentiate it.

    Raises SdaError for options of a method that is not among them, or that its class does not take.
    """
    if unused := set(options) - set(names):
        raise SdaError(f"options are given for method {min(unused)}, which is not scored: name it in methods")

    def classifier(name: str) -> nn.Module:
        return source if quick is None or method_class(name).differentiates else quick

    return [create_from(name, classifier(name), given, options.get(name, {})) for name in names]


def _outcomes(
    methods: Sequence[Method],
    files: Sequence[ImageFile],
    labels: Mapping[str, int],
    pairs: Pairs,
    reader: Reader,
    batch_size: int,
    device: str,
    advance: Callable[[int], None],
) -> tuple[list[np.ndarray], Failures]:
    """For each method, whether its prediction is right: bool [readable images]; and what could not be read."""
    by_key = {file.key: file for file in files}
    batches = [[file.key for file in files[i : i + batch_size]] for i in range(0, len(files), batch_size)]
    failures: Failures = {}
    correct: list[list[Tensor]] = [[] for _ in methods]

    def read(keys: list[str]) -> dict[str, list[Cropped]]:
        folders = {"": by_key, **pairs}
        return {kind: reader([members[key] for key in keys]) for kind, members in folders.items()}

    loaded = Prefetcher(read, batches)
    for keys in batches:
        pictures = loaded(keys)
        errors = {key: error for key, *row in zip(keys, *pictures.values(), strict=True) if (error := _error(row))}
        failures |= {by_key[key].name: str(error) for key, error in errors.items()}
        good = [i for i, key in enumerate(keys) if key not in errors]
        if good:
            truth = torch.tensor([labels[keys[i]] for i in good])
            seeds = [identity("evaluate", keys[i]) for i in good]
            x = {kind: _unit([images[i] for i in good], device) for kind, images in pictures.items()}
            for method, results in zip(methods, correct, strict=True):
                with plain_float32(torch.device(device)):
                    scores = method(x[""], x.get(method.projection) if method.projection else None, seeds)
                results.append(predictions(method, scores).cpu() == truth)
        advance(len(keys))
    return [torch.cat(results).numpy() if results else np.zeros(0, bool) for results in correct], failures


def _error(images: Sequence[Cropped]) -> SdaError | None:
    return next((image for image in images if isinstance(image, SdaError)), None)


def _unit(images: Sequence[Cropped], device: str) -> Tensor:
    """float32 [N, 3, S, S] in [-1, 1]."""
    return to_unit(np.stack([image for image in images if not isinstance(image, SdaError)]), device)
