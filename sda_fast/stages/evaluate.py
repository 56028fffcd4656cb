"""Stage "evaluate": the accuracy of every method on a folder of labelled images and their projections."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sda_fast.data import ImageFile, label_indices, list_images, pair, read_image, resize_short_side, to_unit
from sda_fast.errors import SdaError
from sda_fast.files import write_json
from sda_fast.methods import METHODS, method_class
from sda_fast.methods.base import Method
from sda_fast.methods.ensembles import MODES
from sda_fast.models import Classifier, load_classifier
from sda_fast.stages.manifest import file_sha256, made_with, open_output
from sda_fast.stages.progress import progress
from sda_fast.statistics import make_row

RESULTS = "results.json"


def evaluate(
    input: str | Path,
    output: str | Path,
    model: str | Path,
    finetuned: str | Path | None = None,
    projections: Mapping[str, str | Path] | None = None,
    methods: Sequence[str] | None = None,
    *,
    name: str | None = None,
    mode: str = "sum",
    batch_size: int = 64,
    device: str = "cpu",
    quiet: bool | None = None,
) -> list[dict[str, Any]]:
    """Score methods on the images below `input` and write `<output>/results.json`; returns its rows.

    input: `[<corruption>/[<severity>/]]<class>/<file>`; a subset of classes may be present. projections: folder by
    kind ("dda", "diffpure"), mirroring `input`. methods: by default all whose needs are met. name: of the classifier
    in tables, by default its file's. Labels go by folder name, pairs by relative path. Every corruption's result is
    kept as it is made, so an interrupted run goes on.

    Each row holds method, model, corruption, severity, images, correct, accuracy and its 95 % interval, and
    `outcomes`: 1 or 0 per image in the order of the relative paths. Raises SdaError for missing counterparts, unknown
    classes, wrong weights and other settings than those of a run begun before.
    """
    if mode not in MODES:
        raise SdaError(f"--ensemble {mode!r} is not known; choose one of {', '.join(MODES)}")
    if batch_size < 1:
        raise SdaError(f"--batch-size {batch_size} is out of range: give at least 1")
    files = list_images(input)
    source = load_classifier(model)
    adapted = load_classifier(finetuned) if finetuned else None
    if adapted is not None and adapted.classes != source.classes:
        raise SdaError(f"{finetuned} has other classes than {model}: fine-tune the model you evaluate")
    labels = dict(zip([file.key for file in files], label_indices(files, source.classes), strict=True))
    folders = dict(projections or {})
    chosen = _choose(methods, folders, adapted is not None)
    needed = {p for m in chosen if (p := method_class(m).projection)}
    pairs = {kind: _pairs(files, folders[kind], kind) for kind in sorted(needed)}

    weights = {"model": file_sha256(model), "finetuned": file_sha256(finetuned) if finetuned else None}
    settings = {
        "input": str(Path(input).resolve()),
        "input_made_with": made_with(input),
        "projections": {kind: str(Path(folders[kind]).resolve()) for kind in pairs},
        "projections_made_with": {kind: made_with(folders[kind]) for kind in pairs},
        "methods": chosen,
        "mode": mode,
        "batch_size": batch_size,
        "images": len(files),
        "weights": weights,
    }
    out = open_output(output, "evaluate", settings)
    created = [_create(m, source.to(device), adapted and adapted.to(device), mode) for m in chosen]
    name = name or Path(model).stem
    rows: list[dict[str, Any]] = []
    with progress(len(files), f"evaluating {name}", quiet) as reporter:
        for group, members in _groups(files).items():
            kept = out.folder / "rows" / f"{group or 'all'}.json"
            if kept.exists():
                rows += json.loads(kept.read_text())
                reporter.skip(len(members))
                continue
            outcomes = _outcomes(created, members, labels, pairs, source, batch_size, device, reporter.advance)
            corruption, severity = _describe(group, input)
            group_rows = [
                make_row(method.title, name, corruption, severity, correct)
                for method, correct in zip(created, outcomes, strict=True)
            ]
            write_json(group_rows, kept)
            rows += group_rows
    write_json({"settings": settings, "rows": rows}, out.folder / RESULTS)
    out.finish({"images": len(files), "rows": len(rows)})
    return rows


def _choose(methods: Sequence[str] | None, folders: Mapping[str, Any], finetuned: bool) -> list[str]:
    def lack(name: str) -> str | None:
        kind = method_class(name)
        if kind.projection and kind.projection not in folders:
            return f"the {kind.projection} projections: give --projection {kind.projection}=FOLDER"
        return "a fine-tuned model: give --finetuned FILE" if kind.finetuned and not finetuned else None

    if methods is None:
        return [name for name in METHODS if lack(name) is None]
    for name in methods:
        if reason := lack(name):
            raise SdaError(f"method {name} needs {reason}")
    return list(dict.fromkeys(methods))


def _pairs(files: Sequence[ImageFile], folder: str | Path, kind: str) -> dict[str, ImageFile]:
    projected = list_images(folder, option=f"--projection {kind}=")
    made = (made_with(folder) or {}).get("projection", kind)
    if made != kind:
        raise SdaError(f"--projection {kind}={folder} holds {made} projections: give it as {made}={folder}")
    return {original.key: projection for original, projection in pair(files, projected)}


def _create(name: str, source: Classifier, adapted: Classifier | None, mode: str) -> Method:
    kind = method_class(name)
    options: dict[str, Any] = {"finetuned": adapted} if kind.finetuned else {}
    if kind.ensemble:
        options["mode"] = mode
    return kind(source, **options)


def _groups(files: Sequence[ImageFile]) -> dict[str, list[ImageFile]]:
    """The images by the path above their class folder, "" for a plain folder of classes."""
    groups: dict[str, list[ImageFile]] = defaultdict(list)
    for file in files:
        groups["/".join(file.name.split("/")[:-2])].append(file)
    return dict(groups)


def _describe(group: str, root: str | Path) -> tuple[str, int]:
    """Corruption and severity (0: none given) of a group."""
    *names, last = group.split("/")
    if names and last.isdigit():
        return "/".join(names), int(last)
    return group or Path(root).resolve().name, 0


def _outcomes(
    methods: Sequence[Method],
    files: Sequence[ImageFile],
    labels: Mapping[str, int],
    pairs: Mapping[str, Mapping[str, ImageFile]],
    classifier: Classifier,
    batch_size: int,
    device: str,
    advance: Any,
) -> list[np.ndarray]:
    """For each method, whether its prediction is right: bool [images]."""
    correct: list[list[Tensor]] = [[] for _ in methods]
    for start in range(0, len(files), batch_size):
        part = files[start : start + batch_size]
        truth = torch.tensor([labels[file.key] for file in part])
        images = _read(part, classifier).to(device)
        projected = {
            kind: _read([by_key[file.key] for file in part], classifier).to(device) for kind, by_key in pairs.items()
        }
        for method, results in zip(methods, correct, strict=True):
            scores = method(images, projected.get(method.projection or ""))
            results.append(scores.argmax(dim=1).cpu() == truth)
        advance(len(part))
    return [torch.cat(results).numpy() for results in correct]


def _read(files: Sequence[ImageFile], classifier: Classifier) -> Tensor:
    """Images as the classifier's evaluation sees them: float32 [N, 3, H, W] in [-1, 1]."""
    size, arrays = classifier.input_size, []
    for file in files:
        array = read_image(file.path)
        if classifier.resize is not None:
            array = resize_short_side(array, classifier.resize)
        height, width = array.shape[:2]
        if min(height, width) < size:
            raise SdaError(f"{file.path} is {width}x{height}, the classifier sees {size}x{size}: use larger images")
        top, left = round((height - size) / 2), round((width - size) / 2)
        arrays.append(array[top : top + size, left : left + size])
    return to_unit(np.stack(arrays))
