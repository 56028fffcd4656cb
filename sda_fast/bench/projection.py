"""Timing of a projection against the published algorithm, in one run and only after their results agree."""

from typing import Any

import torch

from sda_fast import reference
from sda_fast.bench.measure import environment, interleaved, tf32
from sda_fast.bench.step import HALF_FACTOR
from sda_fast.engines import Precision, create_engine
from sda_fast.engines.steps import dtype_of
from sda_fast.errors import SdaError
from sda_fast.models import load_adm
from sda_fast.projector import Projector
from sda_fast.weights import weights_path

PARITY = 1e-5  # mean absolute difference of the projections, whose range is [-1, 1]


def bench_projection(
    preset: str,
    images: int,
    repeats: int,
    device: str,
    engine: str = "eager",
    precision: Precision = "fp32",
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Seconds per image of `reference.guided_projection` and of `Projector`, same noise; options: the engine's fields.

    The images are random: time does not depend on what they show. The published algorithm runs eagerly in float32, on a
    GPU with PyTorch's default of TF32 in convolutions while it is timed and without while results are compared; with
    another engine or precision than that, the eager float32 `Projector` is measured beside it.

    The published norm over the batch is used on all sides. Returns one JSON-able row. Raises SdaError if the results
    differ by more than `PARITY` on average, or in half precision by more than `HALF_FACTOR` times what the published
    algorithm under autocast does, in which case no time is reported.
    """
    if preset != "photos":
        raise SdaError(f"--whole measures the preset photos, not {preset!r}: leave out one of the two")
    if images < 2:  # alone, an image's steps under guidance amplify rounding: the published code differs from itself
        raise SdaError(f"--whole compares results, which takes two images at least: --batch {images} is too small")
    if repeats < 1:
        raise SdaError("--repeats must be at least 1")
    adm = load_adm(weights_path("photos:adm")).to(device)
    generator = torch.Generator().manual_seed(0)
    size = adm.image_size
    x = (torch.rand(images, 3, size, size, generator=generator) * 2 - 1).to(device)
    noise = torch.randn(51, *x.shape, generator=generator).to(device)

    unet = reference.UNet(**adm.config).to(device)
    unet.load_state_dict(adm.state_dict())
    chosen = create_engine(engine, **(options or {}))
    projector = Projector(adm, norm="batch", norm_group=images, engine=chosen, precision=precision)

    def published() -> torch.Tensor:
        *_, last = reference.guided_projection(unet, x, noise)
        return last.sample

    def ours() -> torch.Tensor:
        return projector(x, noise=noise)

    with tf32(False):
        exact, bound = published(), PARITY
        if precision != "fp32":
            with torch.autocast(torch.device(device).type, dtype_of(precision)):
                bound = HALF_FACTOR * (exact - published()).abs().mean().item()
        difference = (exact - ours()).abs().mean().item()
    if not difference <= bound:
        raise SdaError(
            f"the projections differ by {difference:.1e} on average, more than {bound:.1e}: no time is reported"
        )
    calls = {"reference_": published, "": ours}
    if engine != "eager" or precision != "fp32":
        eager = Projector(adm, norm="batch", norm_group=images)
        calls["eager_"] = lambda: eager(x, noise=noise)
        eager(x, noise=noise)  # the others have run before
    taken = dict(zip(calls, interleaved(list(calls.values()), repeats, device), strict=True))
    return {
        "benchmark": "projection",
        "preset": preset,
        "images": images,
        "repeats": repeats,
        "engine": engine,
        "precision": precision,
        "options": options or {},
        "parity_mean_abs": difference,
        "parity_bound": bound,
        **{f"{name}seconds_per_image": seconds / images for name, seconds in taken.items()},
        "speedup": taken["reference_"] / taken[""],
        **({"speedup_over_eager": taken["eager_"] / taken[""]} if "eager_" in taken else {}),
        "unit": "s",
        **environment(device),
    }
