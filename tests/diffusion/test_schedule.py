"""Respacing and schedule tables against guided-diffusion's float64 numbers."""

import math

import pytest
import torch

from sda_fast.diffusion import Schedule
from sda_fast.diffusion.schedule import STEP_COLUMNS, space_timesteps
from sda_fast.errors import SdaError
from sda_fast.reference import linear_schedule
from sda_fast.reference.diffusion import spaced_steps


@pytest.mark.parametrize("respacing", ["100", "250", "50", "10", "ddim25", "10,15,20"])
def test_tables_match_the_original(load_reference, respacing):
    tensors, _ = load_reference("schedules")
    schedule = Schedule.linear(respacing)
    expected = {key.rsplit("/", 1)[1]: t for key, t in tensors.items() if key.rsplit("/", 1)[0] == respacing}
    assert len(expected) == 10
    for name, table in expected.items():
        torch.testing.assert_close(
            getattr(schedule, name), table, rtol=1e-12, atol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("steps", "respacing"),
    [(1000, "1000"), (1000, "333"), (1000, "ddim1000"), (7, "1,1"), (10, "2,3"), (10, "ddim5"), (4, "1,1,1,1")],
)
def test_kept_steps_are_those_of_the_reference(steps, respacing):
    assert space_timesteps(steps, respacing) == spaced_steps(steps, respacing)


@pytest.mark.parametrize(("steps", "respacing"), [(1000, "1000"), (100, "100"), (100, "20"), (4000, "50")])
def test_tables_match_the_reference_for_any_number_of_base_steps(steps, respacing):
    schedule, reference = Schedule.linear(respacing, steps), linear_schedule(respacing, steps)
    assert len(schedule) == len(reference)
    for name in ("timestep_map", "betas", "alphas_cumprod", "posterior_variance", "posterior_mean_coef1"):
        expected = torch.from_numpy(getattr(reference, name))
        torch.testing.assert_close(getattr(schedule, name), expected, rtol=1e-12, atol=0)


def test_unspaced_is_the_default_and_tells_the_network_every_step():
    schedule = Schedule.linear()
    assert schedule.respacing == "1000"
    assert torch.equal(schedule.timestep_map, torch.arange(1000))
    assert math.isclose(schedule.betas[0], 1e-4, rel_tol=1e-10)
    assert math.isclose(schedule.betas[-1], 0.02, rel_tol=1e-10)


@pytest.mark.parametrize(
    ("respacing", "problem"),
    [
        ("1001", "1001 is not between 1 and 1000"),
        ("600,1", "600 is not between 1 and 500"),
        ("0", "0 is not between"),
        ("-5", "-5 is not between"),
        ("ddim999", "no integer stride gives 999"),
        ("ddim0", "no integer stride gives 0"),
        ("ddimx", "not of the form"),
        ("many", "not of the form"),
        ("10,,5", "not of the form"),
        ("", "not of the form"),
    ],
)
def test_impossible_respacing_is_refused(respacing, problem):
    with pytest.raises(SdaError, match=problem) as error:
        Schedule.linear(respacing)
    assert repr(respacing) in str(error.value)


def test_step_table():
    schedule = Schedule.linear("100")
    table = schedule.step_table()
    assert (table.shape, table.dtype) == ((100, len(STEP_COLUMNS)), torch.float32)
    named = dict(zip(STEP_COLUMNS, table.double().T, strict=True))
    for name in STEP_COLUMNS[:4]:
        torch.testing.assert_close(named[name], getattr(schedule, name), rtol=1e-7, atol=0)
    torch.testing.assert_close(named["log_variance_high"].exp(), schedule.betas, rtol=1e-6, atol=0)
    torch.testing.assert_close(named["log_variance_low"][1:].exp(), schedule.posterior_variance[1:], rtol=1e-6, atol=0)
    assert named["noise_scale"].tolist() == [0] + [1] * 99
    assert named["timestep"].tolist() == schedule.timestep_map.tolist()
