"""reverse_step, guided and with learned variance as in ADM-256, against the plain version.

The first case, noise given and float32, is the one to compare. Where noise is drawn inside, the plain version draws it
in plain torch, which takes most of its time; against "plain, operator's noise" it gets the noise of the operator.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Case, backends, main

from sda_fast import ops
from sda_fast.diffusion import Schedule
from sda_fast.reference import reverse_step as plain

SCHEDULE = Schedule.linear("100")
INDEX, STEP = 37, 13
SEED = 1
SETTINGS: dict[str, Any] = dict(scale=6.0, norm="image", norm_group=10)


def cases(device: str, tiny: bool) -> Iterator[Case]:
    """float32 and bfloat16 outputs, noise given and drawn, both memory formats, and every version of the operator."""
    nchw, nhwc = torch.contiguous_format, torch.channels_last
    for images in (2,) if tiny else (16,) if device == "cpu" else (16, 32):
        shape = [images, 3, 32, 32] if tiny else [images, 3, 256, 256]
        for backend in backends(device, "cpp", "cuda", "triton"):
            yield case(device, backend, shape, torch.float32, nchw, "plain", drawn=False)
            yield case(device, backend, shape, torch.float32, nchw, "plain", drawn=True)
            yield case(device, backend, shape, torch.float32, nchw, "plain, operator's noise", drawn=True)
            yield case(device, backend, shape, torch.bfloat16, nchw, "plain", drawn=False)
            yield case(device, backend, shape, torch.bfloat16, nhwc, "plain", drawn=False)
            yield case(device, backend, shape, torch.bfloat16, nhwc, "plain", drawn=True)


def case(
    device: str,
    backend: str,
    shape: list[int],
    dtype: torch.dtype,
    layout: torch.memory_format,
    baseline: str,
    drawn: bool,
) -> Case:
    """The error is the largest difference from the plain version in float64; twice the plain version's is allowed."""
    g = torch.Generator().manual_seed(0)
    images, channels, *size = shape

    def normal(channels: int, dtype: torch.dtype) -> torch.Tensor:
        x = torch.randn(images, channels, *size, generator=g).to(device, dtype)
        return x.to(memory_format=layout)

    x, out, noise = normal(channels, torch.float32), normal(2 * channels, dtype), normal(channels, torch.float32)
    guidance: dict[str, Any] = dict(cotangent=normal(channels, dtype), through_network=normal(channels, dtype))
    guidance |= dict(squares=torch.rand(images, generator=g).mul(50).to(device), **SETTINGS)
    table, position = SCHEDULE.step_table(device), torch.tensor([INDEX, STEP], device=device)
    identities = torch.arange(images, device=device)
    draw: dict[str, Any] = dict(seed=SEED, identities=identities) if drawn else dict(noise=noise)
    result = torch.empty_like(x)

    def run() -> torch.Tensor:
        with ops.backend(backend):
            return ops.reverse_step(x, out, table, position, **draw, **guidance, result=result)

    def run_plain() -> torch.Tensor:
        return plain.reverse_step(x, out, table, position, **draw, **guidance)

    def run_plain_compiled_noise() -> torch.Tensor:
        z = ops.philox_normal(shape, seed=SEED, identities=identities, step=STEP)
        return plain.reverse_step(x, out, table, position, noise=z, **guidance)

    exact = plain.reverse_step(x, out, table, position, **draw, **guidance, dtype=torch.float64)

    def error(result: torch.Tensor) -> float:
        return (result - exact).abs().max().item()

    baselines: dict[str, Callable[[], torch.Tensor]] = {
        "plain": run_plain,
        "plain, operator's noise": run_plain_compiled_noise,
    }
    return Case(
        op="reverse_step",
        backend=backend,
        shape=shape,
        dtype=str(dtype).removeprefix("torch."),
        layout=f"{'nchw' if layout == torch.contiguous_format else 'nhwc'} {'drawn' if drawn else 'given'}",
        run=run,
        bytes=x.numel() * (8 + 4 * (not drawn) + 4 * out.element_size()),
        error=lambda: error(run()),
        tolerance=2 * error(run_plain()),
        baseline=baselines[baseline],
        baseline_name=baseline,
    )


if __name__ == "__main__":
    main(cases)
