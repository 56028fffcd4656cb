"""Schedule tables of the reference against the originals' float64 numbers."""

import numpy as np
import pytest

from sda_fast.reference import linear_schedule
from sda_fast.reference.diffusion import spaced_steps


@pytest.mark.parametrize("respacing", ["100", "250", "50", "10", "ddim25", "10,15,20"])
def test_tables_match_the_original(load_reference, respacing):
    tensors, _ = load_reference("schedules")
    schedule = linear_schedule(respacing)
    names = [key.rsplit("/", 1)[1] for key in tensors if key.rsplit("/", 1)[0] == respacing]
    assert len(names) == 10
    for name in names:
        expected = tensors[f"{respacing}/{name}"].numpy()
        table = getattr(schedule, name)
        assert table.dtype == expected.dtype
        np.testing.assert_allclose(table, expected, rtol=1e-12, atol=0, err_msg=name)


def test_square_roots_are_those_of_alphas_cumprod():
    s = linear_schedule("100")
    np.testing.assert_allclose(s.sqrt_alphas_cumprod**2, s.alphas_cumprod, rtol=1e-14)
    np.testing.assert_allclose(s.sqrt_one_minus_alphas_cumprod**2, 1 - s.alphas_cumprod, rtol=1e-14)


def test_no_respacing_keeps_every_base_step():
    s = linear_schedule()
    assert len(s) == 1000
    np.testing.assert_array_equal(s.timestep_map, np.arange(1000))
    np.testing.assert_allclose(s.betas, np.linspace(1e-4, 2e-2, 1000), rtol=1e-10)


def test_sections_and_strides():
    assert spaced_steps(10, "2,3") == [0, 4, 5, 7, 9]  # halves of 5, each from its first to its last step
    assert spaced_steps(7, "1,1") == [0, 4]  # the longer section comes first
    assert spaced_steps(10, "ddim5") == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("respacing", ["1001", "600,1", "ddim999", "1"])
def test_impossible_respacing_is_refused(respacing):
    with pytest.raises(ValueError):
        linear_schedule(respacing)
