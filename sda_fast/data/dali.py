"""The reader that decodes with NVIDIA DALI, an optional package."""

import importlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image

from sda_fast.data.crops import Crop, torch_bicubic
from sda_fast.data.images import ImageFile, read_image
from sda_fast.data.readers import Cropped, cropped
from sda_fast.errors import SdaError

_BATCH = 32  # images per call of DALI: its buffers hold that many full pictures


class DaliReader:
    """DALI decodes the JPEGs, Pillow whatever else there is; PyTorch's bicubic filter resamples all of them.

    On the CPU, DALI's decoder gives Pillow's levels exactly; differences come from the filter alone. JPEGs that DALI
    does not take for whole are Pillow's as well, so both readers refuse the same files.

    Raises SdaError if DALI is not installed, or for `gpu` without a GPU.
    """

    def __init__(self, crop: Crop, threads: int = 2, gpu: bool = False) -> None:
        self._crop = crop
        self._threads = threads
        self._gpu = gpu
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self._pipeline = _make_pipeline(threads, gpu)

    def __call__(self, files: Sequence[ImageFile]) -> list[Cropped]:
        return [image for start in range(0, len(files), _BATCH) for image in self._chunk(files[start : start + _BATCH])]

    def _chunk(self, files: Sequence[ImageFile]) -> list[Cropped]:
        encoded = list(self._pool.map(_read_jpeg, files))
        decoded = iter(self._decode([data for data in encoded if data is not None]))
        arrays = [None if data is None else next(decoded) for data in encoded]
        return list(self._pool.map(self._one, files, arrays))

    def _decode(self, encoded: list[bytes]) -> list[np.ndarray | None]:
        """Each JPEG as uint8 [H, W, 3], valid until the next call; None for all of them if DALI cannot read one."""
        if not encoded:
            return []
        self._pipeline.feed_input("jpeg", [np.frombuffer(data, np.uint8) for data in encoded])
        try:
            (images,) = self._pipeline.run()
        except RuntimeError:  # nothing can be said of the others of the call, nor of the pipeline
            self._pipeline = _make_pipeline(self._threads, self._gpu)
            return [None] * len(encoded)
        images = images.as_cpu()
        return [images.at(i) for i in range(len(encoded))]

    def _one(self, file: ImageFile, array: np.ndarray | None) -> Cropped:
        try:
            return cropped(file, read_image(file.path) if array is None else array, self._crop, torch_bicubic)
        except SdaError as error:
            return error


def _read_jpeg(file: ImageFile) -> bytes | None:
    """The bytes of a JPEG that looks whole and of an ordinary kind; None for what Pillow shall read or refuse."""
    try:
        data = file.path.read_bytes()
        if not data.startswith(b"\xff\xd8") or not data.endswith(b"\xff\xd9"):
            return None
        with Image.open(io.BytesIO(data)) as image:  # reads the header alone, and refuses what is too large
            return data if image.format == "JPEG" and image.mode in ("RGB", "L") else None
    except Exception:  # Pillow raises nearly anything on damaged files; reading it again names what is wrong
        return None


def _make_pipeline(threads: int, gpu: bool) -> Any:
    try:
        dali: Any = importlib.import_module("nvidia.dali")
    except ImportError as error:
        command = 'pip install "sda-fast[dali]"'
        raise SdaError(f"decoder dali needs NVIDIA DALI, which cannot be imported ({error}): {command}") from error
    if gpu and not torch.cuda.is_available():
        raise SdaError('decoder "dali-gpu" needs an NVIDIA GPU, and torch finds none: use "dali" or "pillow"')

    fn, types = dali.fn, dali.types
    device = torch.cuda.current_device() if gpu else None

    @dali.pipeline_def(batch_size=_BATCH, num_threads=threads, device_id=device, prefetch_queue_depth=1)
    def decoding() -> Any:
        encoded = fn.external_source(name="jpeg", dtype=types.UINT8, ndim=1)
        return fn.decoders.image(
            encoded,
            device="mixed" if gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,  # as Pillow: what EXIF says of rotation is not applied
            jpeg_fancy_upsampling=True,  # as libjpeg by default
        )

    pipeline = decoding()
    pipeline.build()
    return pipeline
