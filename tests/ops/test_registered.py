"""The registered operators refuse what the public functions refuse: they get raw pointers behind them."""

import pytest
import torch

from sda_fast import ops  # registers them
from sda_fast.diffusion import LowPass, Schedule
from sda_fast.errors import SdaError
from sda_fast.ops.winograd_convolution import pack_kernels

X, OUT = torch.zeros(2, 3, 8, 8), torch.zeros(2, 6, 8, 8)
TABLE, POSITION, IDS = Schedule.linear("10").step_table(), torch.tensor([3, 1]), torch.tensor([1, 2])
DOWN, _, GRAM = LowPass(8, 2).matrices(X)
GUIDANCE = (X, OUT, LowPass(8, 2).down(X), DOWN, GRAM, TABLE, POSITION)
STEP = (X, OUT, TABLE, POSITION, X, None, None, None, 0, True, None, 0.0, "image", 1, 2)
HALF, KERNELS = torch.zeros(2, 16, 4, 4).bfloat16(), pack_kernels(torch.zeros(64, 16, 3, 3))
WIDE = torch.zeros(2, 3, 8, 8, dtype=torch.float64)

CALLS = {
    "guidance": (GUIDANCE, (X[:1], *GUIDANCE[1:])),
    "guidance_x0": (GUIDANCE, (WIDE, *GUIDANCE[1:])),
    "reverse_step": (STEP, (X, OUT[:, :4], *STEP[2:])),
    "reverse_step_out": ((*STEP, torch.empty_like(X)), (*STEP, torch.empty(1, 3, 8, 8))),
    "philox_normal": ((IDS, (2, 4), 0, 1), (IDS, (3, 4), 0, 1)),
    "philox_normal_out": ((torch.empty(2, 4), IDS, 0, 1), (torch.empty(2, 4).double(), IDS, 0, 1)),
    "to_uint8": ((X, False), (WIDE, False)),
    "to_uint8_out": ((X, False, torch.empty(2, 8, 8, 3, dtype=torch.uint8)), (X, False, torch.empty(2, 8, 8, 3))),
    "winograd_convolution": ((HALF, KERNELS, None), (HALF[:, :8], KERNELS, None)),
}


@pytest.mark.parametrize("name", CALLS)
def test_mistakes_are_refused(name):
    assert ops.BACKENDS
    right, wrong = CALLS[name]
    operator = getattr(torch.ops.sda_fast, name)
    operator(*right)
    with pytest.raises(SdaError):
        operator(*wrong)


def test_noise_of_nobody():
    with pytest.raises(SdaError, match="needs noise"):
        torch.ops.sda_fast.reverse_step(*STEP[:4], None, *STEP[5:])


def test_memory_is_poisoned_before_it_is_written(interpret):
    """What every test here rests on: an operator that leaves an element of its output out is seen."""
    for x in (torch.empty(3), *interpret([("torch", "empty", (3,), {}), ("torch", "empty_like", (X,), {})])):
        assert x.isnan().all()
