"""Timing of a projection against the published algorithm, in one run and only after their results agree."""

from typing import Any

import torch

from sda_fast import reference
from sda_fast.bench.measure import environment, interleaved
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
        raise SdaError(f"--whole measures the preset photos, not {preset!r}: leave out one of the two")
    if images < 1 or repeats < 1:
        raise SdaError("--batch and --repeats must be at least 1")
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
    theirs, ours = interleaved([published, lambda: projector(x, noise=noise)], repeats, device)
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
        **environment(device),
    }
