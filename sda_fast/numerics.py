"""On a GPU PyTorch by itself takes what is fastest: algorithms whose results differ from run to run, and TF32 in
float32 convolutions. Contexts in which it does not."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_CHOICES = (":4096:8", ":16:8")  # without one of them PyTorch refuses products where all must be deterministic


@contextmanager
def deterministic(device: torch.device, *, warn_only: bool = False) -> Iterator[None]:
    """Inside the block, what PyTorch computes on a GPU, and what Inductor compiles for it, has the same bits in every
    run on one kind of GPU with one version of PyTorch. It holds for the whole process. The CPU needs no change.

    By itself cuDNN may add a convolution's products in any order, the gradient of fused attention is added up with
    atomic operations, and Inductor times variants of its reductions in every process anew. Without
    CUBLAS_WORKSPACE_CONFIG, which the commands of sda-fast set and which PyTorch reads at the first product on the GPU,
    the gradient of attention stays as it is, and of several compilations inside the block the first alone is covered.

    warn_only: for code of unknown operators. What has no deterministic version warns instead of raising RuntimeError,
    and the gradient of fused attention stays as it is.
    """
    if device.type != "cuda":
        yield
        return
    from torch._inductor import config as inductor_config  # takes seconds

    cudnn: Any = torch.backends.cudnn  # what type checkers do not see in either
    utils: Any = torch.utils.deterministic
    enabled = torch.are_deterministic_algorithms_enabled()
    lenient = torch.is_deterministic_algorithms_warn_only_enabled()
    before = cudnn.deterministic, cudnn.benchmark, utils.fill_uninitialized_memory, inductor_config.deterministic
    cudnn.deterministic, cudnn.benchmark, utils.fill_uninitialized_memory = True, False, False
    try:
        if os.environ.get(CUBLAS) in CUBLAS_CHOICES:
            torch.use_deterministic_algorithms(True, warn_only=warn_only and (lenient or not enabled))
        inductor_config.deterministic = True
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=lenient)
        cudnn.deterministic, cudnn.benchmark, utils.fill_uninitialized_memory, inductor_config.deterministic = before


@contextmanager
def timed_convolutions(device: torch.device) -> Iterator[None]:
    """Inside the block cuDNN times its algorithms for every new shape of a convolution and keeps to the fastest, which
    may be another one in the next process."""
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, True
    try:
        yield
    finally:
        cudnn.benchmark = before


@contextmanager
def tf32_convolutions(device: torch.device, allowed: bool) -> Iterator[None]:
    """Whether, inside the block, float32 convolutions on a GPU are computed in TF32, which rounds their factors to ten
    bits, as PyTorch does by itself. Matrix products are left alone: they are in TF32 where the process asks for it.

    Afterwards convolutions follow PyTorch's wider settings again if they agreed with those before; what was PyTorch's
    default becomes a setting of convolutions' own.
    """
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    own, wider = (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision), cudnn.fp32_precision
    inside = "tf32" if allowed else "ieee"
    _set_tf32(inside, inside)
    try:
        yield
    finally:
        _set_tf32(*("none" if precision == wider else precision for precision in own))


def _set_tf32(convolutions: str, recurrent: str) -> None:
    cudnn: Any = torch.backends.cudnn
    cudnn.conv.fp32_precision = convolutions
    # PyTorch refuses to read its older setting where that contradicts the newer ones, so it is made too.
    cudnn.allow_tf32 = cudnn.conv.fp32_precision == "tf32"
    cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = convolutions, recurrent


@contextmanager
def plain_float32(device: torch.device) -> Iterator[None]:
    """For code of unknown operators: inside the block a GPU convolves float32 in float32 and, where operators have such
    a version, gives the same bits in every run."""
    with deterministic(device, warn_only=True), tf32_convolutions(device, allowed=False):
        yield
