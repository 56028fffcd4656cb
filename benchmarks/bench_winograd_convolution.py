"""winograd_convolution at shapes of ADM-256 against conv2d, both bfloat16 and channels_last; on the CPU alone."""

from collections.abc import Iterator

import torch
from harness import Case, main
from torch import Tensor
from torch.nn.functional import conv2d

from sda_fast import ops
from sda_fast.bench.step import relative_error
from sda_fast.ops.winograd_convolution import pack_kernels, runs, winograd_convolution

# N, C, K and the sides of the images
SHAPES = [(1, 256, 256, 256), (1, 512, 256, 256), (1, 256, 256, 128), (1, 512, 512, 64), (1, 1024, 1024, 16)]
TINY = [(2, 32, 64, 8)]


def cases(device: str, tiny: bool) -> Iterator[Case]:
    """One case for each shape."""
    if device == "cpu":
        for shape in TINY if tiny else SHAPES:
            yield case(*shape)


def case(images: int, channels: int, kernels: int, side: int) -> Case:
    """The error is relative to the largest allowed: three times that of conv2d. Bytes are those of x, y and the packed
    kernels, FLOPs those of conv2d."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, channels, side, side, generator=generator).bfloat16()
    x = x.to(memory_format=torch.channels_last)
    weight = torch.randn(kernels, channels, 3, 3, generator=generator) * (9 * channels) ** -0.5
    packed = pack_kernels(weight)
    backend = "cpp" if runs() else "plain"  # without the instructions there is no other
    direct = weight.bfloat16().to(memory_format=torch.channels_last)

    def run() -> Tensor:
        with ops.backend(backend):
            return winograd_convolution(x, packed)

    def error() -> float:
        exact = conv2d(x.float(), weight, padding=1)
        return relative_error(run(), exact) / (3 * relative_error(conv2d(x, direct, padding=1), exact))

    return Case(
        op="winograd_convolution",
        backend=backend,
        shape=[images, channels, side, side],
        dtype="bfloat16",
        layout=f"nhwc to {kernels} channels",
        run=run,
        bytes=2 * (x.numel() + images * kernels * side * side + packed.numel()),
        error=error,
        tolerance=1.0,
        baseline=lambda: conv2d(x, direct, padding=1),
        baseline_name="conv2d",
        flops=2 * 9 * images * channels * kernels * side * side,
    )


if __name__ == "__main__":
    main(cases)
