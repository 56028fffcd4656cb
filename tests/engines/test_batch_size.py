"""Batch sizes: what memory affords, what running out of it looks like, and what is tried next."""

import os

import pytest
import torch

from sda_fast.diffusion import LowPass
from sda_fast.engines import GuidedStep
from sda_fast.engines import batch_size as module
from sda_fast.engines.batch_size import affordable_batch, is_out_of_memory, smaller_batch
from sda_fast.engines.graph import trace
from sda_fast.engines.memory import autograd_bytes, needed_bytes, peak_bytes
from sda_fast.errors import SdaError
from sda_fast.models import load_adm


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("AllocateRawInternal Failed to allocate memory for requested buffer of size 4096"),
    ],
    ids=str,
)
def test_memory_that_ran_out_is_known_for_it(error):
    assert is_out_of_memory(error)


def test_pytorch_says_so_on_this_machine():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError(), SdaError("x")]
)
def test_other_errors_are_not(error):
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    ("size", "unit", "smaller"),
    [(64, 1, 32), (7, 1, 3), (2, 1, 1), (20, 10, 10), (30, 10, 10), (50, 10, 20), (15, 10, 10), (4, 3, 3)],
)
def test_half_of_a_batch_in_whole_norm_groups(size, unit, smaller):
    assert smaller_batch(size, MemoryError(), unit) == smaller


@pytest.mark.parametrize(
    ("size", "unit", "told"), [(1, 1, "1 image at"), (10, 10, "10 images at"), (4, 10, "4 images at")]
)
def test_where_nothing_is_smaller_one_sentence_says_so(size, unit, told):
    with pytest.raises(
        SdaError, match=f"there is not enough memory for {told} a time: use a lower precision"
    ) as raised:
        smaller_batch(size, MemoryError("gone"), unit)
    assert str(raised.value.__cause__) == "gone"


def test_a_batch_fills_four_fifths_of_a_share_of_the_memory_that_is_free(tiny, monkeypatch):
    step = GuidedStep(load_adm(tiny.adm), LowPass(16, 4))
    graph, eager = (needed_bytes(step, step.example(2), engine) / 2 for engine in ("inductor", "eager"))
    assert graph == peak_bytes(trace(step, step.example(2))) / 2
    assert 1.2 * graph < eager < 3 * graph  # autograd keeps the inputs of convolutions as well
    kept = [autograd_bytes(step, step.example(n)) for n in (2, 4)]
    assert 1.9 * kept[0] < kept[1] <= 2 * kept[0]  # images, and what they share of a step; weights do not count
    needed = eager
    assert needed > 16 * 16 * 32 * 4  # at least one activation
    free = 0.0

    def sysconf(name):
        return int(free) if name == "SC_AVPHYS_PAGES" else 1

    monkeypatch.setattr(module.os, "sysconf", sysconf)
    monkeypatch.setattr(module, "needed_bytes", lambda *_: 2 * needed)  # each call would trace anew
    for images, processes, expected in [(8.1, 1, 8), (7.9, 1, 4), (8.1, 2, 4), (1000, 1, 64), (0.5, 1, 1), (0, 3, 1)]:
        free = images * needed / 0.8
        assert affordable_batch(step, "eager", processes) == expected
    assert affordable_batch(step, "eager", 1, most=16) == 1
    assert os.sysconf is sysconf
