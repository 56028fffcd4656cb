"""guidance against its plain version, at the shapes of ADM-256's guided step.

Bytes per element: 4 for x and the size of out's dtype for eps and for the cotangent. In channels_last the network's
learned variances lie between the eps, so that their bytes travel too; they are not counted.
"""

from collections.abc import Iterator
from itertools import product

import torch
from harness import Case, backends, main

from sda_fast import ops
from sda_fast.diffusion import LowPass, Schedule
from sda_fast.ops import guidance
from sda_fast.reference.guidance import guidance as plain

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def cases(device: str, tiny: bool) -> Iterator[Case]:
    size, factor = (32, 4) if tiny else (256, 4)
    batches = [2] if tiny else [16] if device == "cpu" else [16, 32]
    for images, (dtype, layout), backend in product(
        batches, product(DTYPES, FORMATS), backends(device, "cpp", "cuda", "triton")
    ):
        yield case(backend, device, images, size, factor, dtype, layout)


def case(backend: str, device: str, images: int, size: int, factor: int, dtype: str, layout: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    shape = (images, 3, size, size)
    x = torch.randn(shape, generator=generator).to(device, memory_format=FORMATS[layout])
    out = torch.randn(images, 6, size, size, generator=generator)
    out = out.to(device, DTYPES[dtype], memory_format=FORMATS[layout])
    lowpass = LowPass(size, factor)
    down, _, gram = (matrix.contiguous() for matrix in lowpass.matrices(x))
    reference_down = lowpass.down(torch.rand(shape, generator=generator).to(device) * 2 - 1)
    table, position = Schedule.linear("100").step_table(device), torch.tensor([20, 0], device=device)
    args = (x, out, reference_down, down, gram, table, position)

    def run() -> tuple[torch.Tensor, ...]:
        with ops.backend(backend):
            return guidance(*args)

    def error() -> float:
        """Of the cotangent, relative to its largest value; and of squares, each relative to itself."""
        cotangent, squares = run()
        expected, norms, _ = plain(x, out.float(), *args[2:])
        worst = (cotangent.float() - expected).abs().max() / expected.abs().max()
        return max(float(worst), float(((squares - norms) / norms).abs().max()))

    return Case(
        op="guidance",
        backend=backend,
        shape=list(shape),
        dtype=dtype,
        layout=layout,
        run=run,
        bytes=x.numel() * (4 + 2 * out.element_size()),
        error=error,
        tolerance=2e-6 if dtype == "float32" else 2.0**-8,  # the last is one rounding to bfloat16
        baseline=lambda: plain(*args),
    )


if __name__ == "__main__":
    main(cases)
