"""Noising against the reference, and the order of the reverse steps."""

import pytest
import torch

from sda_fast.diffusion import Schedule
from sda_fast.diffusion.samplers import ReverseSteps, q_sample
from sda_fast.reference import linear_schedule
from sda_fast.reference import q_sample as reference_q_sample

SHAPE = (2, 3, 8, 8)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("i", [0, 3, 19])
def test_noising_is_that_of_the_reference(i):
    schedule, x0, noise = Schedule.linear("20"), draw(*SHAPE), draw(*SHAPE, seed=1)
    x = q_sample(schedule, i, x0, noise)
    torch.testing.assert_close(x, reference_q_sample(linear_schedule("20"), x0, torch.tensor([i, i]), noise))


def test_reverse_steps():
    """Each counts its own noise and is told its original timestep."""
    steps = ReverseSteps(Schedule.linear("10"), 3)
    assert [position.tolist() for position in steps] == [[2, 1], [1, 2], [0, 3]]
    told = [steps.timesteps(position, torch.zeros(SHAPE)).tolist() for position in steps]
    assert told == [[222, 222], [111, 111], [0, 0]]
    assert len(steps) == 3
    assert len(ReverseSteps(Schedule.linear("10"))) == 10
