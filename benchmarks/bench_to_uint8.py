"""to_uint8 at the shapes of ADM-256, against the plain version; both modes, both memory formats."""

from collections.abc import Iterator

import torch
from harness import Case, main

from sda_fast import ops
from sda_fast.reference import to_uint8 as plain


def cases(device: str, tiny: bool) -> Iterator[Case]:
    """One float32 case for each mode and layout, and a bfloat16 one."""
    for images in (2,) if tiny else (16,) if device == "cpu" else (16, 32):
        shape = [images, 3, 32, 32] if tiny else [images, 3, 256, 256]
        for mode in ("round", "truncate"):
            yield case(device, shape, torch.float32, torch.contiguous_format, mode)
        yield case(device, shape, torch.float32, torch.channels_last, "round")
        yield case(device, shape, torch.bfloat16, torch.contiguous_format, "round")


def case(device: str, shape: list[int], dtype: torch.dtype, layout: torch.memory_format, mode: str) -> Case:
    """The error is the largest difference in levels; none is allowed."""
    x = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1).to(device, dtype)
    x = x.to(memory_format=layout)

    backend = "cpp" if device == "cpu" else "triton"

    def run() -> torch.Tensor:
        with ops.backend(backend):
            return ops.to_uint8(x, mode)

    return Case(
        op="to_uint8",
        backend=backend,
        shape=shape,
        dtype=str(dtype).removeprefix("torch."),
        layout=f"{'nchw' if layout == torch.contiguous_format else 'nhwc'} {mode}",
        run=run,
        bytes=x.numel() * (x.element_size() + 1),
        error=lambda: (run().int() - plain.to_uint8(x, mode).int()).abs().max().item(),
        tolerance=0.0,
        baseline=lambda: plain.to_uint8(x, mode),
    )


if __name__ == "__main__":
    main(cases)
