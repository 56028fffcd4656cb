"""Which version of an operator runs.

`plain` is the torch version of `sda_fast.reference`, `cpp` the compiled one for the CPU, `triton` and `cuda`
are for NVIDIA GPUs (`triton` also for the CPU, interpreted, where TRITON_INTERPRET=1 is set). By itself an
operator takes the first of its versions that runs on the device. The environment variable SDA_FAST_BACKEND,
or `with backend(name):`, which wins over it, insists on one for the whole process.
"""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from sda_fast.errors import SdaError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of images; everything is computed in float32
BACKENDS = ("plain", "cpp", "triton", "cuda")
VARIABLE = "SDA_FAST_BACKEND"

_insisted: str | None = None


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs every operator on one backend inside the block: "plain", "cpp", "triton" or "cuda".

    It holds for the whole process, other threads included. An operator that cannot run there raises SdaError.
    """
    global _insisted
    previous, _insisted = _insisted, _known(name, "backend()")
    try:
        yield
    finally:
        _insisted = previous


def select(op: str, device: torch.device, versions: Sequence[str]) -> str:
    """The backend that runs `op` on `device`, out of its `versions` in order of preference.

    Raises SdaError if the version insisted on does not exist or does not run on the device.
    """
    name = _insisted or _known(os.environ.get(VARIABLE, ""), VARIABLE)
    if not name:
        return next(version for version in versions if not _obstacle(version, device))
    obstacle = _obstacle(name, device) if name in versions else f"the operator has only {', '.join(versions)}"
    if obstacle:
        raise SdaError(f"{op} cannot run as {name!r} on {device}: {obstacle}; choose another backend.")
    return name


@cache
def core() -> ModuleType:
    """The compiled module `sda_fast._core`; SdaError where it was not built."""
    try:
        import sda_fast._core as module
    except ImportError as error:
        raise SdaError(
            f"the compiled module sda_fast._core does not load ({error}); install the package with "
            "`make venv` or `pip install .` instead of importing its source folder."
        ) from error
    return module


def dtype_code(dtype: torch.dtype) -> int:
    """The number by which csrc/status.h calls one of `DTYPES`."""
    return int(getattr(core(), str(dtype).removeprefix("torch.")))


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Inside, the current CUDA device, and so the current stream, is that of x; on the CPU it changes nothing."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _known(name: str, where: str) -> str:
    if name and name not in BACKENDS:
        raise SdaError(f"{where} got {name!r}; it takes one of {', '.join(BACKENDS)}.")
    return name


def _obstacle(name: str, device: torch.device) -> str:
    """Why the backend does not run on this device; empty if it does."""
    if name == "cpp":
        return "" if device.type == "cpu" else "the C++ version is for the CPU"
    if name == "cuda":
        if device.type != "cuda":
            return "the CUDA version is for NVIDIA GPUs"
        return "" if core().cuda_built else "this installation was built without CUDA"
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
            return ""
        return "Triton is for GPUs, or for the CPU where TRITON_INTERPRET=1 is set"
    return ""
