"""Timing of a projection against the published algorithm, in one run and only after their results agree."""

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from sda_fast import reference
from sda_fast.errors import SdaError
from sda_fast.models import load_adm
from sda_fast.projector import Projector
from sda_fast.weights import weights_path

PARITY = 1e-5  # mean absolute difference of the projections, whose range is [-1, 1]


def bench_projection(preset: str, images: int, repeats: int, device: str) -> dict[str, Any]:
    """Seconds per image of `reference.guided_projection` and of `Projector`, both eager float32, same noise.

    The images are random: time does not depend on what they show.

    The published norm over the batch is used on both sides. Returns one JSON-able row. Raises SdaError if the
    results differ by more than `PARITY` on average, in which case no time is reported.
    """
    if preset != "photos":
        raise SdaError(f'preset {preset!r} is not known; this version has "photos"')
    if images < 1 or repeats < 1:
        raise SdaError("--images and --repeats must be at least 1")
    adm = load_adm(weights_path("photos:adm")).to(device)
    generator = torch.Generator().manual_seed(0)
    size = adm.image_size
    x = (torch.rand(images, 3, size, size, generator=generator) * 2 - 1).to(device)
    noise = torch.randn(51, *x.shape, generator=generator).to(device)

    unet = reference.UNet(**adm.config).to(device)
    unet.load_state_dict(adm.state_dict())
    projector = Projector(adm, norm="batch", norm_group=images)

    def published() -> torch.Tensor:
        *_, last = reference.guided_projection(unet, x, noise)
        return last.sample

    difference = (published() - projector(x, noise=noise)).abs().mean().item()
    if not difference <= PARITY:
        raise SdaError(
            f"the projections differ by {difference:.1e} on average, more than {PARITY}: no time is reported"
        )
    theirs, ours = _interleaved([published, lambda: projector(x, noise=noise)], repeats, device)
    return {
        "benchmark": "projection",
        "preset": preset,
        "images": images,
        "repeats": repeats,
        "parity_mean_abs": difference,
        "reference_seconds_per_image": theirs / images,
        "seconds_per_image": ours / images,
        "speedup": theirs / ours,
        "unit": "s",
        "device": torch.cuda.get_device_name() if device != "cpu" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _interleaved(calls: list[Callable[[], Any]], repeats: int, device: str) -> list[float]:
    """Median seconds of each call, taken in turn so that a drifting machine favours none."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for taken, call in zip(times, calls, strict=True):
            _wait(device)
            started = time.perf_counter()
            call()
            _wait(device)
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in times]


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)
