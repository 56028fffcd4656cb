"""Stage "align": project every image of a folder onto the diffusion model's domain.

The same stage aligns the synthetic images of SDA's first half and projects the target images of its second.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from sda_fast.data import (
    Decoder,
    DiffusionCrop,
    ImageFile,
    Prefetcher,
    Source,
    Writer,
    by_condition,
    find_images,
    identity,
    list_images,
    make_reader,
    reading_threads,
    shown,
    to_uint8,
    to_unit,
)
from sda_fast.data.images import JPEG_SUFFIXES
from sda_fast.data.readers import Cropped
from sda_fast.diffusion.guidance import Norm
from sda_fast.engines import Precision
from sda_fast.engines.create import with_winograd
from sda_fast.errors import SdaError
from sda_fast.models import ADM, load_adm, with_phase_convolutions
from sda_fast.projector import Projector, Purifier
from sda_fast.stages.batch_size import BatchSize, execution_batch, record_smaller
from sda_fast.stages.batches import Work, plan, run_batches
from sda_fast.stages.failures import Failures, counting_what_is_done, report_listing, write_failures
from sda_fast.stages.manifest import Output, file_sha256, made_with, open_output, require_apart
from sda_fast.stages.ranks import is_first, processes_here, ranks, wait_for_all
from sda_fast.stages.sources import Sources, made_of_inputs


@dataclass(frozen=True)
class AlignSettings:
    """Everything that changes a projection; all of it stands in the manifest.

    projection: "dda" (low-pass guidance) or "diffpure" (none, ancestral). respacing and start default to the
    published "100" and 50 for dda, "1000" and 150 for diffpure. phase_convolutions: see `sda_fast.models.phases`.
    winograd: of the inductor engine on a CPU, see `sda_fast.engines.winograd`.
    jacobian_free: of dda alone, an approximation. batch_size is the execution batch: it changes last bits only; "auto"
    takes what fits into memory. decoder: how images are read, see `sda_fast.data.readers`. format: "png", or "original"
    for the published code's files, that is JPEG of quality 75 under the input's own name if that is a JPEG's. The other
    names are those of `Projector`.
    """

    projection: Literal["dda", "diffpure"] = "dda"
    respacing: str | None = None
    start: int | None = None
    factor: int = 4
    scale: float = 6.0
    norm: Norm = "image"
    norm_group: int = 10
    jacobian_free: bool = False
    engine: str = "eager"
    precision: Precision = "fp32"
    phase_convolutions: bool = False
    winograd: bool = False
    batch_size: BatchSize = 10
    seed: int = 0
    decoder: Decoder = "pillow"
    format: Literal["png", "original"] = "png"

    def resolved(self) -> "AlignSettings":
        """The same with respacing and start filled in. Raises SdaError for what is not known or contradicts."""
        if self.projection not in PUBLISHED:
            raise SdaError(f'projection {self.projection!r} is not known; choose "dda" or "diffpure"')
        if self.jacobian_free and self.projection != "dda":
            raise SdaError(f"{self.projection} has no guidance that could be jacobian_free: leave that out")
        if self.format not in ("png", "original"):
            raise SdaError(f'format {self.format!r} is not known; choose "png" or "original"')
        respacing, start = PUBLISHED[self.projection]
        return replace(self, respacing=self.respacing or respacing, start=start if self.start is None else self.start)

    @property
    def grouped(self) -> bool:
        """Whether images have a norm together, so that one's result depends on others."""
        return self.projection == "dda" and self.norm == "batch"

    def suffix(self, file: ImageFile) -> str:
        """Of the projection's file."""
        jpeg = self.format == "original" and file.path.suffix.lower() in JPEG_SUFFIXES
        return file.path.suffix if jpeg else ".png"


SURPLUS = "what they were made of is gone: delete them"
PUBLISHED = {"dda": ("100", 50), "diffpure": ("1000", 150)}  # respacing and start


def make_projection(adm: Any, settings: AlignSettings, batch_size: int | None = None) -> Projector | Purifier:
    """The projection these settings describe, in batches of `batch_size` or else as they say.

    Raises SdaError for settings out of range.
    """
    settings = settings.resolved()
    if settings.phase_convolutions:
        adm = with_phase_convolutions(adm)
    common: dict[str, Any] = {
        name: getattr(settings, name) for name in ("respacing", "start", "engine", "precision", "seed")
    }
    if settings.winograd:
        common["engine"] = with_winograd(settings.engine)
    if batch_size is None and settings.batch_size != "auto":
        batch_size = settings.batch_size
    common["batch_size"] = batch_size
    if settings.projection == "diffpure":
        return Purifier(adm, **common)
    return Projector(
        adm,
        factor=settings.factor,
        scale=settings.scale,
        norm=settings.norm,
        norm_group=settings.norm_group,
        jacobian_free=settings.jacobian_free,
        **common,
    )


def align(
    input: str | Path,
    output: str | Path,
    adm: str | Path,
    settings: AlignSettings | None = None,
    *,
    preset: str | None = None,
    exactly: bool = False,
    device: str = "cpu",
    workers: int = 1,
    quiet: bool | None = None,
) -> dict[str, Any]:
    """Project every image below `input` into `output` under the same relative path; returns a summary.

    Files are PNG, or as `settings.format` says. Images are cut to the ADM's size as guided-diffusion crops. An image's
    result depends on its path, its pixels and the settings alone (with norm="batch" also on the others of its group,
    consecutive in the sorted list of their corruption). Resumes where an earlier run stopped; an image that was
    changed since is projected anew, which its file tells by the SHA-256 of its input. What cannot be read is left out
    and stands in `<output>/failures.json`, with norm="batch" together with its group; a later call tries it again.
    exactly: whether the folder may hold no other images, which is then found before any is projected.

    Raises SdaError for wrong folders, weights and settings.
    """
    settings = (settings or AlignSettings()).resolved()
    # An image that is not listed would shift all groups after it: then nothing may be wrong with the folder.
    files, listed = (list_images(input), {}) if settings.grouped else find_images(input)
    model = check_align(adm, settings, preset, device)  # wrong settings must fail before the folder is made
    require_apart(output, input, "project projections")
    out = open_output(output, "align", align_record(input, adm, settings, model.image_size))
    if exactly:
        out.require_no_others([file.key for file in files], SURPLUS)
    batch_size = execution_batch(
        out, settings.batch_size, lambda: make_projection(load_adm(adm, preset).to(device), settings), workers
    )

    groups = norm_groups(files, settings)
    done = projection_done(out, groups, settings)
    todo = plan([[file.key for file in group] for group in groups], done, batch_size)
    # A worker among several cannot know its next batch; while it reads, the others compute.
    foreseen = todo if workers == 1 and ranks() is None else []
    threads = reading_threads(max(1, workers) * processes_here())
    with counting_what_is_done([file.key for file in files], done):
        failures = report_listing(listed) | run_batches(
            todo,
            _make_work,
            (adm, preset, settings, batch_size, device, out, groups, foreseen, threads),
            label=f"{settings.projection} projection",
            total=len(files),
            workers=workers,
            quiet=quiet,
        )
    if is_first():
        write_failures(out.folder, failures)
        out.finish({"images": len(files), "failed": len(failures)})
    wait_for_all()
    names = {file.key: file.name for file in files}
    projected = sum(names[key] not in failures for batch in todo for key in batch)
    return {"images": len(files), "projected": projected, "failed": len(failures), "output": str(output)}


def check_align(adm: str | Path, settings: AlignSettings, preset: str | None, device: str) -> ADM:
    """The ADM on the meta device. Raises SdaError for weights or settings that a projection would refuse.

    Only keys and shapes are looked at, so it costs neither time nor memory.
    """
    model = load_adm(adm, preset).to("meta")
    network = make_projection(model, settings).network
    network.engine.check(network.step, torch.device(device))
    make_reader(settings.decoder, DiffusionCrop(model.image_size))
    return model


def align_record(input: str | Path, adm: str | Path, settings: AlignSettings, image_size: int) -> dict[str, Any]:
    """What the manifest says of a projection of `input`, whose own manifest and weights are read for it."""
    origin = {"input": str(Path(input).resolve()), "input_made_with": made_with(input)}
    weights = {"adm": file_sha256(adm)}
    # Groups across corruptions, as earlier versions formed them, had other norms.
    grouping = {"norm_groups": "by corruption"} if settings.grouped else {}
    return {**asdict(settings), **grouping, "image_size": image_size, **origin, "weights": weights}


def _make_work(
    adm: str | Path,
    preset: str | None,
    settings: AlignSettings,
    batch_size: int,
    device: str,
    out: Output,
    groups: Sequence[Sequence[ImageFile]],
    foreseen: list[list[str]],
    threads: int,
) -> Work:
    model = load_adm(adm, preset).to(device)
    project = make_projection(model, settings, batch_size)
    reader = make_reader(settings.decoder, DiffusionCrop(model.image_size), threads)
    files = {file.key: file for group in groups for file in group}
    group_of = _group_of(groups)

    def load(keys: list[str]) -> tuple[list[Source], list[Cropped]]:
        sources = _sources(group_of)
        return [sources(key).now for key in keys], reader([files[key] for key in keys])

    read, write, done = Prefetcher(load, foreseen), Writer(), projection_done(out, groups, settings)

    def work(keys: list[str]) -> Failures:
        sources, images = read(keys)
        cropped, made_of = dict(zip(keys, images, strict=True)), dict(zip(keys, sources, strict=True))
        unreadable = {key: str(image) for key, image in cropped.items() if isinstance(image, SdaError)}
        reasons = {key: reason for key in keys if (reason := _reason(key, unreadable, group_of[key]))}
        arrays = {key: a for key, a in cropped.items() if key not in reasons and not isinstance(a, SdaError)}
        if arrays:
            batch = to_unit(np.stack(list(arrays.values())), device)
            seeds = [identity("align", files[key].name) for key in arrays]
            projected = to_uint8(project(batch, seeds=seeds), "round")
            write.flush()
            for key, array in zip(arrays, projected, strict=True):
                if not done(key):
                    write(array, out.path(key, settings.suffix(files[key])), made_of[key])
            record_smaller(out, batch_size, project.batch_size)
        if not foreseen or keys == foreseen[-1]:
            write.flush()
        return {files[key].name: reason for key, reason in reasons.items() if not done(key)}

    return work


def norm_groups(files: Sequence[ImageFile], settings: AlignSettings) -> list[list[ImageFile]]:
    """The images by what each one's result depends on: itself, or with norm="batch" those of its group."""
    size = settings.norm_group if settings.grouped else 1
    parts = by_condition(files).values() if settings.grouped else [files]
    return [list(part[i : i + size]) for part in parts for i in range(0, len(part), size)]


def projection_done(
    out: Output, groups: Sequence[Sequence[ImageFile]], settings: AlignSettings
) -> Callable[[str], bool]:
    """The test whether the projection of a key is there, whole, and of the inputs as they are now."""
    group_of = _group_of(groups)

    def suffix(key: str) -> str:
        return settings.suffix(next(file for file in group_of[key] if file.key == key))

    return made_of_inputs(out, _sources(group_of), suffix)


GroupOf = Mapping[str, Sequence[ImageFile]]  # by key


def _group_of(groups: Sequence[Sequence[ImageFile]]) -> GroupOf:
    return {file.key: group for group in groups for file in group}


def _sources(group_of: GroupOf) -> Callable[[str], Sources]:
    """By key, the files that a projection is made of; of neighbours in a group, which have the same, read once."""

    @lru_cache(maxsize=1)
    def of_group(first: str) -> Sources:
        return Sources([file.path for file in group_of[first]])

    return lambda key: of_group(group_of[key][0].key)


def _reason(key: str, unreadable: dict[str, str], group: Sequence[ImageFile]) -> str | None:
    """Why an image is left out: it cannot be read, or another of its group cannot, and they have one norm."""
    if key in unreadable:
        return unreadable[key]
    others = [file.key for file in group if file.key in unreadable]
    return f"{shown(key)} is of one norm group with {shown(others[0])}: {unreadable[others[0]]}" if others else None
