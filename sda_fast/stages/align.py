"""Stage "align": project every image of a folder onto the diffusion model's domain.

The same stage aligns the synthetic images of SDA's first half and projects the target images of its second.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from sda_fast.data import (
    ImageFile,
    center_crop,
    identity,
    list_images,
    read_image,
    to_uint8,
    to_unit,
    write_png,
)
from sda_fast.diffusion.guidance import Norm
from sda_fast.errors import SdaError
from sda_fast.models import load_adm
from sda_fast.projector import Projection, Projector, Purifier
from sda_fast.stages.batches import Work, plan, run_batches
from sda_fast.stages.manifest import Output, file_sha256, made_with, open_output


@dataclass(frozen=True)
class AlignSettings:
    """Everything that changes a projection; all of it stands in the manifest.

    projection: "dda" (low-pass guidance) or "diffpure" (none, ancestral). respacing and start default to the
    published "100" and 50 for dda, "1000" and 150 for diffpure. batch_size is the execution batch: it changes
    last bits only. The other names are those of `Projector`.
    """

    projection: Literal["dda", "diffpure"] = "dda"
    respacing: str | None = None
    start: int | None = None
    factor: int = 4
    scale: float = 6.0
    norm: Norm = "image"
    norm_group: int = 10
    engine: str = "eager"
    precision: str = "fp32"
    batch_size: int = 10
    seed: int = 0

    def resolved(self) -> "AlignSettings":
        """The same with respacing and start filled in. Raises SdaError for an unknown projection."""
        if self.projection not in PUBLISHED:
            raise SdaError(f'projection {self.projection!r} is not known; choose "dda" or "diffpure"')
        respacing, start = PUBLISHED[self.projection]
        return replace(self, respacing=self.respacing or respacing, start=start if self.start is None else self.start)


PUBLISHED = {"dda": ("100", 50), "diffpure": ("1000", 150)}  # respacing and start


def make_projection(adm: Any, settings: AlignSettings) -> Projection:
    """The projection these settings describe. Raises SdaError for settings out of range."""
    settings = settings.resolved()
    assert settings.respacing is not None
    assert settings.start is not None
    batch = {"batch_size": settings.batch_size, "seed": settings.seed}
    if settings.projection == "diffpure":
        if (settings.engine, settings.precision) != ("eager", "fp32"):
            raise SdaError(
                f'projection "diffpure" has engine "eager" and precision "fp32" only, '
                f"not {settings.engine!r} and {settings.precision!r}"
            )
        return Purifier(adm, respacing=settings.respacing, start=settings.start, **batch)
    return Projector(
        adm,
        respacing=settings.respacing,
        start=settings.start,
        factor=settings.factor,
        scale=settings.scale,
        norm=settings.norm,
        norm_group=settings.norm_group,
        engine=settings.engine,
        precision=settings.precision,
        **batch,
    )


def align(
    input: str | Path,
    output: str | Path,
    adm: str | Path,
    settings: AlignSettings | None = None,
    *,
    preset: str | None = None,
    device: str = "cpu",
    workers: int = 1,
    quiet: bool | None = None,
) -> dict[str, Any]:
    """Project every image below `input` into `output` as PNG under the same relative path; returns a summary.

    Images are cut to the ADM's size as guided-diffusion crops. An image's result depends on its path, its pixels
    and the settings alone (with norm="batch" also on the others of its group, consecutive in the sorted list).
    Resumes where an earlier run stopped. Raises SdaError for wrong folders, files, weights and settings.
    """
    settings = (settings or AlignSettings()).resolved()
    files = list_images(input)
    model = load_adm(adm, preset)
    make_projection(model, settings)  # wrong settings must fail before the folder is made
    if Path(output).resolve().is_relative_to(Path(input).resolve()):
        raise SdaError(f"--output {output} lies in --input {input}: a second call would project projections; move it")
    origin = {"input": str(Path(input).resolve()), "input_made_with": made_with(input)}
    weights = {"adm": file_sha256(adm)}
    recorded = {**asdict(settings), "image_size": model.image_size, **origin, "weights": weights}
    del model  # every worker loads its own
    out = open_output(output, "align", recorded)

    size = settings.norm_group if settings.projection == "dda" and settings.norm == "batch" else 1
    groups = [[file.key for file in files[i : i + size]] for i in range(0, len(files), size)]
    todo = plan(groups, out.done, settings.batch_size)
    by_key = {file.key: file for file in files}
    run_batches(
        todo,
        _make_work,
        (adm, preset, settings, device, out, by_key),
        label=f"{settings.projection} projection",
        total=len(files),
        workers=workers,
        quiet=quiet,
    )
    summary = {"images": len(files), "projected": sum(len(b) for b in todo), "output": str(output)}
    out.finish({"images": len(files)})
    return summary


def _make_work(
    adm: str | Path,
    preset: str | None,
    settings: AlignSettings,
    device: str,
    out: Output,
    files: dict[str, ImageFile],
) -> Work:
    model = load_adm(adm, preset).to(device)
    project = make_projection(model, settings)

    def work(keys: list[str]) -> None:
        images = read_batch([files[key] for key in keys], model.image_size).to(device)
        seeds = [identity("align", files[key].name) for key in keys]
        for key, array in zip(keys, to_uint8(project(images, seeds=seeds), "round"), strict=True):
            if not out.done(key):
                write_png(array, out.path(key))

    return work


def read_batch(files: Sequence[ImageFile], size: int) -> torch.Tensor:
    """Images read and cut to size x size: float32 [N, 3, size, size] in [-1, 1]."""
    return to_unit(np.stack([center_crop(read_image(file.path), size) for file in files]))
