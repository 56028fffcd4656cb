"""The low-pass matrices against ResizeRight's numbers, against the reference's resizing, and as an operator."""

import pytest
import torch

from sda_fast.diffusion import LowPass
from sda_fast.errors import SdaError
from sda_fast.reference import low_pass

CASES = [(32, 2), (32, 4), (64, 8), (256, 4), (256, 32)]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative(value, expected):
    """Worse of the relative error in the L2 norm and the largest error over the largest value."""
    error = (value - expected).double()
    return float(max(error.norm() / expected.double().norm(), error.abs().max() / expected.abs().max()))


@pytest.mark.parametrize(("size", "factor"), CASES)
def test_value_norm_and_gradient_match_the_original(load_reference, size, factor):
    tensors, _ = load_reference("lowpass")
    prefix = f"size{size}_factor{factor}/"
    case = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    lowpass = LowPass(size, factor)
    norms, gradient = lowpass.gradient(case["reference"], case["x"], norm_group=len(case["x"]))
    values = {"down": lowpass.down(case["x"]), "up": lowpass(case["x"]), "norm": norms[0], "grad_x": gradient}
    assert norms.shape == (1,)
    errors = {name: relative(value, case[name]) for name, value in values.items()}
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize(("size", "factor"), [(24, 3), (40, 5), (16, 16), (30, 1), (48, 12)])
def test_agrees_with_resizing(size, factor):
    x = draw(2, 3, size, size)
    assert relative(LowPass(size, factor)(x), low_pass(x, factor)) <= 1e-5


def test_residual_is_the_symmetric_operator_whose_quadratic_form_is_the_squared_norm():
    lowpass = LowPass(32, 4)
    d, e = draw(2, 3, 32, 32, dtype=torch.float64), draw(2, 3, 32, 32, seed=1, dtype=torch.float64)
    zero = torch.zeros_like(d)
    smooth_d, squares = lowpass.residual(lowpass.down(d), zero)
    smooth_e, _ = lowpass.residual(lowpass.down(e), zero)
    torch.testing.assert_close((smooth_d * e).sum(), (d * smooth_e).sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close((smooth_d * d).sum((1, 2, 3)), squares, rtol=1e-12, atol=0)
    torch.testing.assert_close(lowpass(d).square().sum((1, 2, 3)), squares, rtol=1e-12, atol=0)


@pytest.mark.parametrize("norm_group", [1, 2, 5, 10])
def test_gradient_is_that_of_the_norm_of_each_group(norm_group):
    lowpass = LowPass(16, 2)
    reference, x = draw(5, 3, 16, 16), draw(5, 3, 16, 16, seed=1).requires_grad_()
    difference = lowpass(reference) - lowpass(x)
    expected = torch.stack([torch.linalg.vector_norm(group) for group in difference.split(norm_group)])
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    norms, ours = lowpass.gradient(reference, x.detach(), norm_group)
    assert relative(norms, expected.detach()) <= 1e-5
    assert relative(ours, gradient) <= 1e-5


def test_without_a_residual_norm_and_gradient_are_zero():
    lowpass = LowPass(16, 4)
    x = draw(2, 3, 16, 16)
    reference = torch.stack([x[0], x[1] + 1])
    norms, gradient = lowpass.gradient(reference, x)
    assert norms[0] == 0
    assert not gradient[0].any()
    assert norms[1] > 0
    assert gradient[1].any()


def test_no_images_have_no_norms():
    norms, gradient = LowPass(16, 4).gradient(*torch.zeros(2, 0, 3, 16, 16), norm_group=4)
    assert norms.shape == (0,)
    assert gradient.shape == (0, 3, 16, 16)


def test_constant_images_pass_and_fade_at_the_border_only():
    y = LowPass(64, 4)(torch.ones(1, 1, 64, 64))[0, 0]
    torch.testing.assert_close(y[16:-16, 16:-16], torch.ones(32, 32))
    assert (y[0] - 1).abs().max() > 0.05  # the image is taken to be zero outside


@pytest.mark.parametrize("factor", [3, 0, -2, 64])
def test_a_factor_that_does_not_divide_the_size_is_refused(factor):
    with pytest.raises(SdaError, match=f"D={factor} does not divide the image size 32"):
        LowPass(32, factor)


def test_images_of_another_size_are_refused():
    with pytest.raises(SdaError, match=r"takes 32x32 images, not \[32, 16\]"):
        LowPass(32, 4)(torch.zeros(1, 3, 32, 16))
