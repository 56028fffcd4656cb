"""Rows of a study: every contender under every corruption and stream, shared by processes, kept as they are made."""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sda_fast.data import (
    EvaluationCrop,
    ImageFile,
    Prefetcher,
    Source,
    below_condition,
    by_condition,
    describe,
    identity,
    label_indices,
    list_images,
    make_reader,
    reading_threads,
    to_unit,
)
from sda_fast.errors import SdaError
from sda_fast.files import write_json
from sda_fast.methods import method_class
from sda_fast.methods.base import Method, predictions
from sda_fast.models import Classifier
from sda_fast.numerics import plain_float32
from sda_fast.stages.batches import Work, run_batches
from sda_fast.stages.evaluate import sources_of
from sda_fast.stages.manifest import open_output
from sda_fast.stages.sources import Sources
from sda_fast.statistics import Row, make_row
from sda_fast.studies.config import StudyConfig
from sda_fast.studies.contenders import Contender, Loader, images_at_once, recorded
from sda_fast.studies.streams import NO_STREAM, Stream, segments

SAVE_EVERY = 60.0  # seconds
Groups = Mapping[str, list[ImageFile]]
# Keys to images and projections [N, 3, S, S] in [-1, 1], and what each image's pair was read from.
Show = Callable[[list[str]], tuple[Tensor, Tensor | None, list[Source]]]


@dataclass(frozen=True)
class Job:
    """A part of the work that is done in one piece: a contender, a stream (None: any) and the corruptions in it.

    path: the file that keeps what came out; changed: the images that are no longer what it says of them.
    """

    contender: Contender
    stream: Stream | None
    groups: tuple[str, ...]
    path: Path
    changed: frozenset[str] = frozenset()


def score(
    config: StudyConfig,
    study: str,
    contenders: Sequence[Contender],
    projections: Mapping[str, Path],
    streams: Sequence[Stream] = (),
    quiet: bool | None = None,
) -> list[Row]:
    """The rows of all contenders, under `<output>/<study>/`; those that learn from their stream under each of them.

    A row is that of `sda_fast.statistics` and says its stream ("any" if it holds for every one) and
    `seconds_per_image`. What an earlier call kept of images that have not changed since is not computed again: of a
    per-image method image by image, of others stream by stream. Raises SdaError for images that cannot be read, labels
    that are unknown, and results that were made with other settings.
    """
    groups = corrupted_groups(config)
    jobs = [job for c in contenders for job in _jobs(config, study, c, groups, projections, streams)]
    sources = _sources(jobs, groups, projections)
    jobs = [replace(job, changed=_changed(job, of)) for job, of in zip(jobs, sources, strict=True)]
    left = {str(job.path): job for job in jobs if not _is_done(job, groups)}
    by_cost = sorted(left.items(), key=lambda item: -item[1].contender.evaluations * _images(item[1], groups))
    run_batches(
        # A batch is a job's name, once for each of its images, which is what progress counts.
        [[name] * _images(job, groups) for name, job in by_cost],
        _make_work,
        (config, projections, left, groups),
        label=study,
        total=sum(_images(job, groups) for job in jobs),
        workers=config.workers,
        quiet=quiet,
    )
    return [row for job in jobs for row in _rows(job, groups, config.target)]


def corrupted_groups(config: StudyConfig) -> dict[str, list[ImageFile]]:
    """The target's images by corruption; uncorrupted ones (severity 0) are left out unless there is nothing else.

    Raises SdaError for a folder that is not in order.
    """
    groups = by_condition(list_images(config.target, "target"))
    corrupted = {name: files for name, files in groups.items() if describe(name, config.target)[1]}
    return corrupted or groups


def _jobs(
    config: StudyConfig,
    study: str,
    contender: Contender,
    groups: Groups,
    projections: Mapping[str, Path],
    streams: Sequence[Stream],
) -> list[Job]:
    folder = Path(config.output) / study / contender.model / contender.folder
    open_output(folder, study, recorded(config, contender, projections))
    jobs = []
    for stream in [None] if contender.per_image else streams:
        apart = stream is None or stream.by_corruption
        name = "any" if stream is None else stream.folder
        for part in [(group,) for group in groups] if apart else [tuple(groups)]:
            path = folder / name / f"{(part[0] or 'images') if apart else 'all'}.json"
            jobs.append(Job(contender, stream, part, path))
    return jobs


def _images(job: Job, groups: Groups) -> int:
    return sum(len(groups[name]) for name in job.groups)


def _files(job: Job, groups: Groups) -> list[ImageFile]:
    return [file for name in job.groups for file in groups[name]]


def _kept(job: Job) -> dict[str, Any]:
    """What stands on disk of a job: whether each image, by key, was classified rightly, and the seconds it took."""
    try:
        kept = {"sources": {}, **json.loads(job.path.read_text(encoding="utf-8"))}
    except FileNotFoundError:
        return _nothing()
    except (OSError, ValueError, TypeError) as error:
        raise SdaError(f"{job.path} cannot be read ({error}): delete it and give the same command again") from error
    if lacking := {"seconds", "timed", "right"} - kept.keys():
        raise SdaError(f"{job.path} lacks {min(lacking)!r}: delete it and give the same command again")
    return kept


def _nothing() -> dict[str, Any]:
    return {"sources": {}, "seconds": 0.0, "timed": 0, "right": {}}


def _still_right(job: Job) -> dict[str, Any]:
    """What stands on disk without the images that have changed since."""
    kept = _kept(job)
    return {**kept, "right": {key: value for key, value in kept["right"].items() if key not in job.changed}}


def _sources(jobs: Sequence[Job], groups: Groups, projections: Mapping[str, Path]) -> list[dict[str, Sources]]:
    """What each job looks at, by image; jobs that look at the same share it, so that no file is read twice."""
    found: dict[tuple[tuple[str, ...], str | None], dict[str, Sources]] = {}
    folders = {kind: {file.key: file for file in list_images(folder)} for kind, folder in projections.items()}
    of_jobs = []
    for job in jobs:
        kind = method_class(job.contender.method).projection
        if (job.groups, kind) not in found:
            projected = [folders[kind]] if kind else []
            found[job.groups, kind] = {file.key: sources_of([file], projected) for file in _files(job, groups)}
        of_jobs.append(found[job.groups, kind])
    return of_jobs


def _changed(job: Job, sources: Mapping[str, Sources]) -> frozenset[str]:
    """The images that are no longer what the results say, their projections included."""
    kept = _kept(job)
    right, said = kept["right"], kept["sources"]
    own = os.stat(job.path).st_mtime_ns if right else 0
    unknown = Source("", own)

    def same(key: str) -> bool:
        then = Source(*said[key]) if key in said else unknown
        return sources[key].made(then.mtime_ns, lambda: then.sha256 or None)

    return frozenset(key for key in right if key in sources and not same(key))


def _is_done(job: Job, groups: Groups) -> bool:
    there, wanted = _kept(job)["right"].keys(), {file.key for file in _files(job, groups)}
    complete = there >= wanted if job.stream is None else there == wanted
    return complete and not job.changed


def _rows(job: Job, groups: Groups, root: str) -> list[Row]:
    kept = _kept(job)
    stream = NO_STREAM if job.stream is None else job.stream.columns()
    rows = []
    for group in job.groups:
        corruption, severity = describe(group, root)
        right = [kept["right"][file.key] for file in groups[group]]
        names = [below_condition(file) for file in groups[group]]
        row = make_row(job.contender.label, job.contender.model, corruption, severity, right, names)
        rows.append({**row, **stream, "seconds_per_image": kept["seconds"] / kept["timed"]})
    return rows


def _make_work(config: StudyConfig, projections: Mapping[str, Path], jobs: Mapping[str, Job], groups: Groups) -> Work:
    loader = Loader(config)

    def work(names: list[str]) -> None:
        job = jobs[names[0]]
        tta, source = loader.method(job.contender), loader.source(job.contender)
        files = _files(job, groups)
        if job.stream is None:
            kept = _still_right(job)
            missing = [file for file in files if file.key not in kept["right"]]
            size = images_at_once(config, job.contender)
            parts = [[missing[i : i + size] for i in range(0, len(missing), size)]]
        else:
            kept = _nothing()
            parts = segments(job.stream, {name: groups[name] for name in job.groups}, config.compare.seed)
        keys = [[[file.key for file in batch] for batch in part] for part in parts]
        folder = projections[tta.projection] if tta.projection else None
        show = Prefetcher(_make_show(config, source, files, folder), [batch for part in keys for batch in part])
        labels = dict(zip([file.key for file in files], label_indices(files, source.classes), strict=True))
        _see(tta, keys, show, labels, kept, job.path if job.stream is None else None, config.device)
        write_json(kept, job.path)

    return work


def _see(
    tta: Method,
    parts: Sequence[Sequence[list[str]]],
    show: Show,
    labels: Mapping[str, int],
    kept: dict[str, Any],
    path: Path | None,
    device: str,
) -> None:
    """Show a method batch after batch, resetting it before each part; what comes out is added to `kept`.

    path: where to keep it from time to time; None where a part of it is worth nothing.
    """
    # On the CPU all of a method's work is done in this thread; its own time does not count other programs.
    clock = time.thread_time if torch.device(device).type == "cpu" else time.perf_counter
    saved = time.monotonic()
    for part in parts:
        tta.reset()
        for batch in part:
            images, projected, sources = show(batch)
            begun = clock()
            with plain_float32(torch.device(device)):
                scores = tta(images, projected, [identity("evaluate", key) for key in batch])
            predicted = predictions(tta, scores).tolist()
            kept["seconds"] += clock() - begun
            kept["timed"] += len(batch)
            kept["sources"].update(zip(batch, sources, strict=True))
            kept["right"].update({key: int(k == labels[key]) for key, k in zip(batch, predicted, strict=True)})
            if path is not None and time.monotonic() - saved > SAVE_EVERY:
                write_json(kept, path)
                saved = time.monotonic()


def _make_show(config: StudyConfig, source: Classifier, files: Sequence[ImageFile], folder: Path | None) -> Show:
    evaluate = config.evaluate
    crop = EvaluationCrop(source.input_size, source.resize if evaluate.resize else source.input_size)
    reader = make_reader(evaluate.decoder, crop, reading_threads(config.workers))
    originals = {file.key: file for file in files}
    projected = {} if folder is None else {file.key: file for file in list_images(folder)}

    def read(files: list[ImageFile]) -> Tensor:
        arrays = []
        for image in reader(files):
            if isinstance(image, SdaError):
                raise image
            arrays.append(image)
        return to_unit(np.stack(arrays), config.device)

    def show(keys: list[str]) -> tuple[Tensor, Tensor | None, list[Source]]:
        sources = [sources_of([originals[key]], [projected]).now for key in keys]
        images = read([originals[key] for key in keys])
        return images, None if folder is None else read([projected[key] for key in keys]), sources

    return show
