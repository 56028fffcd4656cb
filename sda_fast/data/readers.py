"""Files to cropped images, in threads: one interface, two ways of decoding.

    pillow     Pillow decodes and resamples: the published code's pixels, bit for bit
    dali       NVIDIA DALI decodes JPEGs on the CPU, PyTorch resamples: several levels in a thousand differ, by 1 or 2
    dali-gpu   the same, decoded on the GPU, whose JPEG decoder differs by a few levels more

The decoder changes pixels, so it is a setting of the stages and stands in their manifests.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, Protocol, get_args

import numpy as np

from sda_fast.data.crops import Crop, Resample, pillow_bicubic
from sda_fast.data.images import ImageFile, read_image, shown
from sda_fast.errors import SdaError

Decoder = Literal["pillow", "dali", "dali-gpu"]
DECODERS: tuple[str, ...] = get_args(Decoder)
Cropped = np.ndarray | SdaError  # uint8 [S, S, 3], or why there is none


class Reader(Protocol):
    """Reads files: for each, in order, the cropped image or the error that names the file; it does not raise."""

    def __call__(self, files: Sequence[ImageFile]) -> list[Cropped]: ...


def make_reader(decoder: str, crop: Crop, threads: int = 2) -> Reader:
    """The reader of that name, working in `threads` threads.

    Raises SdaError for an unknown decoder and if DALI or the GPU it needs is missing.
    """
    if decoder == "pillow":
        return PillowReader(crop, threads)
    if decoder in DECODERS:
        from sda_fast.data.dali import DaliReader

        return DaliReader(crop, threads, gpu=decoder == "dali-gpu")
    raise SdaError(f"decoder {decoder!r} is not known; choose from {', '.join(DECODERS)}")


def reading_threads(workers: int) -> int:
    """Threads for each of `workers` processes: all cores between them, but no more than a network can keep busy."""
    return max(1, min(8, (os.cpu_count() or 1) // workers))


class PillowReader:
    """Every format Pillow knows; its decoders and filters let go of Python's lock, so threads help."""

    def __init__(self, crop: Crop, threads: int = 2) -> None:
        self._crop = crop
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")

    def __call__(self, files: Sequence[ImageFile]) -> list[Cropped]:
        return list(self._pool.map(self._one, files))

    def _one(self, file: ImageFile) -> Cropped:
        try:
            return cropped(file, read_image(file.path), self._crop, pillow_bicubic)
        except SdaError as error:
            return error


def cropped(file: ImageFile, array: np.ndarray, crop: Crop, resample: Resample) -> np.ndarray:
    """`crop` of an image; the error of one that cannot be cropped names its file."""
    try:
        return crop(array, resample)
    except SdaError as error:
        raise SdaError(f"{shown(str(file.path))}: {error}") from error
