"""Stage "corrupt": ImageNet-C's fifteen corruptions and ImageNet-W's watermark for a folder of one's own images.

The pixels are not those of the published files: Motion blur, snow and frost are made without ImageMagick, every image
has a seed of its own, and the result is stored as PNG. The manifest says so.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sda_fast.data import (
    CORRUPTIONS,
    EvaluationCrop,
    ImageFile,
    corrupt,
    find_images,
    identity,
    make_reader,
    watermark,
    write_png,
)
from sda_fast.data.corruptions import library_version
from sda_fast.errors import SdaError
from sda_fast.stages.batches import Work, plan, run_batches
from sda_fast.stages.failures import Failures, counting_what_is_done, report_listing, write_failures
from sda_fast.stages.manifest import Output, file_sha256, made_with, open_output, require_apart
from sda_fast.stages.ranks import alone
from sda_fast.stages.sources import Sources, made_of_inputs

WATERMARK = "watermark"
NOT_OFFICIAL = "made by sda-fast from other images: not the official files of ImageNet-C or ImageNet-W"


@dataclass(frozen=True)
class CorruptSettings:
    """Everything that changes a corrupted image, beside which corruptions are asked for.

    size and resize: the short side is brought to `resize` (bicubically) and the central square of `size` cut out before
    the corruption, as in ImageNet-C. jpeg_quality: of the compression that follows a corruption of ImageNet-C (not the
    watermark); None for none. font: for the watermark, see `sda_fast.data.watermark`.
    """

    size: int = 224
    resize: int = 256
    jpeg_quality: int | None = 85
    seed: int = 0
    font: str | None = None


def corrupt_folder(
    input: str | Path,
    output: str | Path,
    corruptions: Sequence[str] = CORRUPTIONS,
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    settings: CorruptSettings | None = None,
    *,
    workers: int = 1,
    quiet: bool | None = None,
) -> dict[str, Any]:
    """Write `<output>/<corruption>/<severity>/<path>.png` of every image below `input`; returns a summary.

    "watermark" is a corruption too, has no severity and goes to `<output>/watermark/<path>.png`. An image depends on
    its path, its pixels, the corruption, the severity and the settings alone, so a later call with further corruptions
    or severities adds to the folder. Resumes where an earlier run stopped; of inputs that were changed since, all is
    made anew. What cannot be read is left out and stands
    in `<output>/failures.json`; a later call tries it again.

    Raises SdaError for wrong folders, unknown corruptions, settings out of range and a missing library or font.
    """
    alone("corrupt")
    settings = settings or CorruptSettings()
    _check(corruptions, severities, settings)
    files, listed = find_images(input)
    require_apart(output, input, "corrupt again")
    # Always the same settings, so that further corruptions can be added; what was not used is not asked for.
    library = library_version() if set(corruptions) - {WATERMARK} else None
    out = open_output(output, "corrupt", _recorded(input, settings))

    variants = [name for name in dict.fromkeys(corruptions) if name == WATERMARK]
    variants += [f"{name}/{s}" for name in dict.fromkeys(corruptions) if name != WATERMARK for s in severities]
    groups = [[f"{variant}/{file.key}" for variant in variants] for file in files]
    by_key = {file.key: file for file in files}
    done = _done(out, by_key)
    todo = plan(groups, done, len(variants))
    with counting_what_is_done([key for group in groups for key in group], done):
        failures = report_listing(listed) | run_batches(
            todo,
            _make_work,
            (settings, out, by_key),
            label="corrupting",
            total=len(files) * len(variants),
            workers=workers,
            quiet=quiet,
        )
    write_failures(out.folder, failures)
    images = (len(files) - sum(file.name in failures for file in files)) * len(variants)
    summary = {"images": images, "failed": len(failures)}
    out.finish({**summary, "variants": variants, "library": library})
    return {**summary, "output": str(output)}


def _check(corruptions: Sequence[str], severities: Sequence[int], settings: CorruptSettings) -> None:
    for name in corruptions:
        if name not in (*CORRUPTIONS, WATERMARK):
            raise SdaError(f"--corruption {name} is not known; choose from {', '.join((*CORRUPTIONS, WATERMARK))}")
    for severity in severities:
        if severity not in (1, 2, 3, 4, 5):
            raise SdaError(f"--severity {severity} is out of range: 1 is the weakest, 5 the strongest")
    if not 32 <= settings.size <= settings.resize:
        raise SdaError(f"--size {settings.size} is out of range: give 32 to --resize, here {settings.resize}")
    if settings.jpeg_quality is not None and not 1 <= settings.jpeg_quality <= 95:
        raise SdaError(f"--jpeg-quality {settings.jpeg_quality} is out of range: give 1 to 95")
    if WATERMARK in corruptions:  # a missing font must be known before the folder is made
        watermark(np.zeros((settings.size, settings.size, 3), np.uint8), settings.font)


def _recorded(input: str | Path, settings: CorruptSettings) -> dict[str, Any]:
    font = file_sha256(settings.font) if settings.font else None
    origin = {"input": str(Path(input).resolve()), "input_made_with": made_with(input)}
    return {"note": NOT_OFFICIAL, **asdict(settings), "font": font, **origin}


def _make_work(settings: CorruptSettings, out: Output, files: dict[str, ImageFile]) -> Work:
    reader = make_reader("pillow", EvaluationCrop(settings.size, settings.resize), threads=1)
    done = _done(out, files)

    def work(keys: list[str]) -> Failures:
        variants = [_split(key) for key in keys]
        file = files[variants[0][2]]
        source = Sources([file.path]).now
        (image,) = reader([file])
        if isinstance(image, SdaError):
            return {file.name: str(image)}
        for key, (name, severity, _) in zip(keys, variants, strict=True):
            if not done(key):
                write_png(_corrupted(image, name, severity, key, settings), out.path(key), source)
        return {}

    return work


def _done(out: Output, files: dict[str, ImageFile]) -> Callable[[str], bool]:
    return made_of_inputs(out, lambda key: Sources([files[_split(key)[2]].path]))


def _split(key: str) -> tuple[str, int, str]:
    """Corruption, severity (0: none) and the original's key."""
    name, _, rest = key.partition("/")
    if name == WATERMARK:
        return name, 0, rest
    severity, _, rest = rest.partition("/")
    return name, int(severity), rest


def _corrupted(image: np.ndarray, name: str, severity: int, key: str, settings: CorruptSettings) -> np.ndarray:
    if name == WATERMARK:
        return watermark(image, settings.font)
    array = corrupt(image, name, severity, identity(f"corrupt {settings.seed}", key))
    if settings.jpeg_quality is None:
        return array
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="JPEG", quality=settings.jpeg_quality)
    return np.array(Image.open(buffer))
