"""What the tests of guidance share: arguments, the registered operator's results in float64, the tolerance rule."""

from typing import NamedTuple

import torch

from sda_fast.diffusion import LowPass, Schedule
from sda_fast.reference.guidance import guidance as plain
from sda_fast.reference.guidance import guidance_residual

TINY = 1e-6  # of errors relative to the largest value, added to twice the plain version's
CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last


class Sizes(NamedTuple):
    images: int
    channels: int
    out_channels: int
    size: int
    factor: int
    dtype: torch.dtype = torch.float32
    x_format: torch.memory_format = CONTIGUOUS
    out_format: torch.memory_format = CONTIGUOUS


# Odd sizes and factors, one low row, several tiles of rows, factors from none to beyond eight. Small, because Triton's
# interpreter takes milliseconds for a row.
CASES = [
    Sizes(1, 2, 4, 8, 4),
    Sizes(1, 3, 6, 8, 4, x_format=LAST, out_format=LAST),
    Sizes(1, 2, 2, 10, 5, out_format=LAST),
    Sizes(1, 2, 2, 9, 3, torch.bfloat16, x_format=LAST),
    Sizes(1, 2, 2, 16, 8, torch.float16, LAST, LAST),
    Sizes(1, 1, 1, 5, 1),
    Sizes(1, 1, 2, 9, 9, torch.float16),
    Sizes(1, 1, 1, 96, 16),
    Sizes(0, 3, 6, 16, 4),
]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def matrices(size, factor, dtype=torch.float32):
    down, _, gram = LowPass(size, factor).matrices(torch.zeros(1, 1, size, size, dtype=dtype))
    return down.contiguous(), gram.contiguous()


def arguments(sizes, seed=0):
    """What `guidance` takes, the step somewhere in the middle: most of raw lies in [-1, 1]."""
    n = sizes.size
    x = draw(sizes.images, sizes.channels, n, n, seed=seed).to(memory_format=sizes.x_format)
    out = draw(sizes.images, sizes.out_channels, n, n, seed=seed + 1).to(sizes.dtype)
    reference = draw(sizes.images, sizes.channels, n, n, seed=seed + 2).clamp(-1, 1)
    down, gram = matrices(n, sizes.factor)
    table, position = Schedule.linear("100").step_table(), torch.tensor([20, 7])
    return x, out.to(memory_format=sizes.out_format), down @ reference @ down.T, down, gram, table, position


def oracle(args):
    """cotangent and squares in float64, of x0 and the mask as float32 has them."""
    x, out, reference_down, *_ = args
    _, _, x0 = plain(*args)
    a, b = args[5][args[6][0], :2]
    raw = a * x - b * out[:, : x.shape[1]].float()
    down, gram = matrices(x.shape[2], x.shape[2] // reference_down.shape[2], torch.float64)
    gradient, squares = guidance_residual(x0.double(), reference_down.double(), down, gram)
    return torch.where((raw >= -1) & (raw <= 1), gradient, 0), squares, x0


def relative(value, expected):
    if not expected.numel():
        return 0.0
    return float((value.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def assert_as_good_as_plain(results, args):
    """The rule of tolerance, the clamp mask and x0 exactly, dtype and memory format."""
    x, out, *_ = args
    expected = oracle(args)
    for result, low, exact in zip(results, plain(*args), expected, strict=True):
        assert result.shape == low.shape
        assert relative(result, exact) <= 2 * relative(low, exact) + TINY
    cotangent, squares, x0 = results
    assert (cotangent.dtype, squares.dtype, x0.dtype) == (out.dtype, torch.float32, torch.float32)
    assert torch.equal(x0, expected[2])
    assert not cotangent[expected[0] == 0].any()
    for result, like in ((cotangent, out[:, : x.shape[1]].clone()), (x0, x)):
        assert result.is_contiguous(memory_format=LAST if like.is_contiguous(memory_format=LAST) else CONTIGUOUS)


LARGER = [
    Sizes(2, 3, 6, 128, 4),
    Sizes(2, 3, 6, 60, 5, torch.bfloat16, LAST, LAST),
    Sizes(2, 2, 4, 36, 12, torch.float16, x_format=LAST),
    Sizes(1, 3, 6, 96, 32, out_format=LAST),
    Sizes(1, 3, 3, 33, 1, out_format=LAST),
]


def assert_same(results, expected):
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result, value)
