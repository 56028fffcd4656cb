"""philox_normal at the shapes of ADM-256: bytes are the noise written, the baseline is the plain version."""

from collections.abc import Iterator

import torch
from harness import Case, backends, main
from torch import Tensor

from sda_fast import ops
from sda_fast.ops import philox_normal
from sda_fast.reference import philox

MAX_ULP = 3.0  # of the polynomials against the correctly rounded formula, see csrc/philox.h


def cases(device: str, tiny: bool) -> Iterator[Case]:
    images = (2,) if tiny else (16,) if device == "cpu" else (16, 32)
    for n in images:
        shape = (n, 3, 16, 16) if tiny else (n, 3, 256, 256)
        for layout in ("contiguous", "channels_last"):
            for backend in backends(device, "cpp", "triton", "cuda"):
                yield case(backend, shape, layout, device)


def case(backend: str, shape: tuple[int, ...], layout: str, device: str) -> Case:
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    out = torch.full(shape, float("nan"), device=device).to(memory_format=memory_format)
    identities = torch.arange(shape[0], device=device)
    numbers = {"seed": 2024, "identities": identities, "step": 3}

    def run() -> Tensor:
        with ops.backend(backend):
            return philox_normal(shape, **numbers, out=out)

    def plain() -> Tensor:
        return philox.philox_normal(shape, **numbers)

    def error() -> float:
        ours, theirs = (x.contiguous().view(torch.int32).long() for x in (run(), plain()))
        return (ours - theirs).abs().max().item()

    return Case(
        op="philox_normal",
        backend=backend,
        shape=list(shape),
        dtype="float32",
        layout=layout,
        run=run,
        bytes=4 * out.numel(),
        error=error,
        tolerance=MAX_ULP,
        baseline=plain,
    )


if __name__ == "__main__":
    main(cases)
