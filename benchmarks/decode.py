"""Loader throughput: photographs of 500x375 to crops of 256x256, by every decoder that works here, against Pillow.

    python benchmarks/decode.py [--device cpu|cuda] [--images N] [--threads N] [--repeats N] [--output FOLDER]

The JPEGs are made for the purpose, smooth with some noise, about 90 kB each as ImageNet's. All decoders read the same
files, in turn. The crops are compared with Pillow's; a decoder beyond its bound has no figure, one whose library is
missing is named as skipped.
Rows go to <output>/decode.jsonl. Exits with 1 where a crop is beyond the bound.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from harness import environment
from PIL import Image

from sda_fast.data import DiffusionCrop, list_images, make_reader
from sda_fast.data.images import ImageFile
from sda_fast.data.readers import Reader
from sda_fast.errors import SdaError

BATCH = 64
# Largest difference of a crop's levels from Pillow's, and its mean over the worst image.
BOUNDS = {"dali": (2, 0.02), "dali-gpu": (255, 1.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2, help="of every reader")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder that takes the rows")
    options = parser.parse_args()
    readers: dict[str, Reader] = {}
    for name in ("pillow", "dali", *(["dali-gpu"] if options.device == "cuda" else [])):
        try:
            readers[name] = make_reader(name, DiffusionCrop(256), options.threads)
        except SdaError as error:
            print(f"SKIPPED: {name}: {error}", flush=True)
    names = list(readers)
    with tempfile.TemporaryDirectory() as folder:
        kilobytes = write_photos(Path(folder), options.images, options.threads)
        files = list_images(folder)
        found = {name: differences(readers[name], readers["pillow"], files) for name in names[1:]}
        times = interleaved(readers, files, options.repeats)
    common = {"images": len(files), "kilobytes_per_image": round(kilobytes, 1), "reading_threads": options.threads}
    failed = False
    for name in names:
        row = {"benchmark": "decode", "decoder": name, **common, **environment(options.device)}
        row |= result(name, len(files), times, found.get(name))
        failed |= "images_per_second" not in row
        print(line(row), flush=True)
        if options.output is not None:
            options.output.mkdir(parents=True, exist_ok=True)
            with (options.output / "decode.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
    sys.exit(1 if failed else 0)


def result(
    name: str, images: int, times: dict[str, list[float]], difference: tuple[int, float] | None
) -> dict[str, float]:
    """What was measured of a decoder; no times where its crops are beyond the bound."""
    taken = {decoder: statistics.median(seconds) for decoder, seconds in times.items()}
    speed = {"images_per_second": round(images / taken[name], 1), "speedup": round(taken["pillow"] / taken[name], 3)}
    if difference is None:
        return speed
    crops = dict(zip(("largest_difference", "mean_difference"), difference, strict=True))
    within = all(value <= bound for value, bound in zip(difference, BOUNDS[name], strict=True))
    return {**crops, **(speed if within else {})}


def line(row: dict[str, Any]) -> str:
    text = f"{row['decoder']:<9}"
    if "largest_difference" in row:
        text += (
            f" crops differ by {row['largest_difference']} levels at most, {row['mean_difference']:.4f} in the mean;"
        )
    if "images_per_second" not in row:
        return f"{text} PARITY FAILED: allowed are {BOUNDS[row['decoder']]}; no figure"
    return f"{text} {row['images_per_second']:.1f} images/s, {row['speedup']:.2f}x pillow"


def write_photos(folder: Path, images: int, threads: int) -> float:
    """JPEGs of 500x375 and 375x500, each another picture; returns kilobytes per image."""

    def write(i: int) -> int:
        rng = np.random.default_rng(i)
        size = (500, 375) if i % 4 else (375, 500)
        coarse = Image.fromarray(rng.integers(256, size=(size[1] // 16, size[0] // 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
        noise = rng.integers(-25, 26, smooth.shape, dtype=np.int16)
        path = folder / f"{i:05d}.jpg"
        Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8)).save(path, quality=90)
        return path.stat().st_size

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(write, range(images))) / images / 1000


def differences(reader: Reader, pillow: Reader, files: list[ImageFile]) -> tuple[int, float]:
    """The largest difference of any level, and the largest mean difference of any image."""
    largest, mean = 0, 0.0
    for start in range(0, len(files), BATCH):
        part = files[start : start + BATCH]
        for one, other in zip(reader(part), pillow(part), strict=True):
            difference = np.abs(one.astype(int) - other)
            largest, mean = max(largest, int(difference.max())), max(mean, float(difference.mean()))
    return largest, mean


def interleaved(readers: dict[str, Reader], files: list[ImageFile], repeats: int) -> dict[str, list[float]]:
    """Seconds that each reader takes for all files, in turn so that a drifting machine favours none."""
    times: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(repeats):
        for name, reader in readers.items():
            started = time.perf_counter()
            for start in range(0, len(files), BATCH):
                reader(files[start : start + BATCH])
            times[name].append(time.perf_counter() - started)
    return times


if __name__ == "__main__":
    main()
