"""Writes the images of one batch while the network runs on the next."""

from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np

from sda_fast.data.images import JPEG_SUFFIXES, Source, write_jpeg, write_png

_THREADS = 4  # compressing 256x256 takes about 10 ms and does not hold Python's lock


class Writer:
    """Takes images and returns at once; at most what was given since the last `flush` is held."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="write")
        self._waiting: list[Future[None]] = []

    def __call__(self, array: np.ndarray, path: Path, source: Source | None = None) -> None:
        """Write a uint8 image [H, W, 3], whole or not at all: as JPEG if `path` ends like one, else as PNG.

        source: see `sda_fast.data.images.write_png`.
        """
        write = write_jpeg if path.suffix.lower() in JPEG_SUFFIXES else write_png
        self._waiting.append(self._threads.submit(write, array, path, source))

    def flush(self) -> None:
        """Wait until everything is written that can be. Raises what went wrong with the first image that could not."""
        waiting, self._waiting = self._waiting, []
        wait(waiting)
        for future in waiting:
            future.result()
