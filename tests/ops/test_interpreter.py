"""Kernels under Triton's interpreter: the faults of access that it is made to find."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="torch brings no Triton on this system")
tl = triton.language
N, BLOCK = 24, 16


@triton.jit
def copy_kernel(
    p_from, p_to, n, reach, step, twice: tl.constexpr, again: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr
):
    p_from = tl.multiple_of(p_from, 4 * VECTOR)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_value = tl.load(p_from + i, mask=i < n + reach, other=0.0)
    tl.store(p_to + i * step, b_value, mask=i < n)
    if twice:
        tl.store(p_to + i * step, b_value, mask=i < n)
    if again:
        b_value = tl.load(p_to + i * step, mask=i < n)
        tl.store(p_from + i, b_value, mask=i < n)


def copy(source, target, reach, step, twice, again, vector):
    copy_kernel[(triton.cdiv(N, BLOCK),)](source, target, N, reach, step, twice, again, vector, BLOCK=BLOCK)
    return target


def call(target=None, reach=0, step=1, twice=False, again=False, first=0):
    source = torch.arange(float(first + N))[first:]
    target = torch.full((N,), float("nan")) if target is None else target(source)
    args = (source, target, reach, step, twice, again, 4)
    return "test_interpreter", "copy", args, {}


def test_a_right_kernel(interpret):
    alone, in_place = interpret([call(), call(lambda source: source)])
    assert torch.equal(alone, torch.arange(float(N)))
    assert torch.equal(in_place, alone)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (dict(reach=1), r"program 1 leaves its tensors at \[8\]"),
        (dict(target=lambda source: source[1:]), "program 1 reads what a program of its launch writes"),
        (
            dict(target=lambda source: source.as_strided((N,), (1,), 0), first=4),
            "program 1 writes what another one",
        ),
        (dict(twice=True), "program 0 writes what was written in its launch"),
        (dict(step=0), "program 0 writes two values to one address"),
        (dict(again=True), "program 0 reads what a program of its launch writes"),
        (dict(first=1), "are no multiples of 16"),
    ],
)
def test_faults(interpret, fault, reason):
    with pytest.raises(AssertionError, match=reason):
        interpret([call(**fault)])
