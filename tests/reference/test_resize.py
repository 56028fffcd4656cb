"""The reference's low-pass filter against ResizeRight's numbers, and its properties."""

import pytest
import torch

from sda_fast.reference import low_pass, resize

CASES = [(32, 2), (32, 4), (64, 8), (256, 4), (256, 32)]


@pytest.mark.parametrize(("size", "factor"), CASES)
def test_value_norm_and_gradient_match_the_original(load_reference, size, factor):
    tensors, _ = load_reference("lowpass")
    case = {key.split("/")[1]: t for key, t in tensors.items() if key.startswith(f"size{size}_factor{factor}/")}
    x = case["x"].clone().requires_grad_()
    down = resize(x, 1 / factor, (size // factor, size // factor))
    up = low_pass(x, factor)
    norm = torch.linalg.vector_norm(low_pass(case["reference"], factor) - up)
    (grad_x,) = torch.autograd.grad(norm, x)
    for value, name in [(down, "down"), (up, "up"), (norm, "norm"), (grad_x, "grad_x")]:
        torch.testing.assert_close(value.detach(), case[name], rtol=1e-5, atol=1e-5 * float(case[name].abs().max()))


def test_constant_stays_constant_inside_and_fades_at_the_border():
    y = low_pass(torch.ones(1, 1, 64, 64), 4)[0, 0]
    torch.testing.assert_close(y[16:-16, 16:-16], torch.ones(32, 32))
    # Weights are normalised before the zero padding is seen.
    assert (y[0] - 1).abs().max() > 0.05


def test_filter_is_linear_and_separable():
    n, factor = 24, 4
    # phi(x) = A x A^T. Image j, a line in column j, gives A 1 (A e_j)^T; a constant image gives A 1 (A 1)^T.
    lines = low_pass(torch.eye(n)[:, None, :].expand(n, n, n).contiguous(), factor)
    middle = low_pass(torch.ones(n, n), factor)[n // 2, n // 2].sqrt()
    axis = lines[:, n // 2, :].T / middle
    x = torch.randn(2, 3, n, n, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(low_pass(x, factor), axis @ x @ axis.T, rtol=1e-4, atol=1e-5)


def test_sizes_that_the_factor_does_not_divide_come_back_as_they_were():
    x = torch.randn(1, 3, 30, 45, generator=torch.Generator().manual_seed(0))
    y = low_pass(x, 4)
    assert y.shape == x.shape
    assert y.isfinite().all()


def test_memory_layout_does_not_matter():
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(low_pass(x.to(memory_format=torch.channels_last), 4), low_pass(x, 4))
    assert torch.equal(low_pass(x.mT, 4), low_pass(x.mT.contiguous(), 4))


def test_gradient():
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: low_pass(x, 2), x)
