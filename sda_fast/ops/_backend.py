"""Which version of an operator runs.

`plain` is the torch version of `sda_fast.reference`, `cpp` the compiled one for the CPU, `triton` and `cuda`
are for NVIDIA GPUs (`triton` also for the CPU, interpreted, where TRITON_INTERPRET=1 is set). By itself an
operator takes the first of its versions that runs on the device and takes the sizes at hand. The environment
variable SDA_FAST_BACKEND, or `with backend(name):`, which wins over it, insists on one for the whole process.
"""

import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from sda_fast.errors import SdaError

BACKENDS = ("plain", "cpp", "triton", "cuda")
VARIABLE = "SDA_FAST_BACKEND"
OLDEST = (8, 0)  # compute capability: what Triton supports, and what csrc/cuda is written for

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


def select(
    op: str, device: torch.device, versions: Sequence[str], objection_to: Callable[[str], str] = lambda version: ""
) -> str:
    """The backend that runs `op` on `device`, out of its `versions` in order of preference.

    objection_to: why a version whose backend runs on the device does not serve here, be it the sizes at hand or an
        instruction that is missing; empty if it does. It must not look at the number of images, whose results would
        then depend on their batch.

    Raises SdaError if the version insisted on does not exist, does not run on the device or does not serve here.
    """

    def reason_against(version: str) -> str:
        return obstacle(version, device) or objection_to(version)

    name = _insisted or _known(os.environ.get(VARIABLE, ""), VARIABLE)
    if not name:
        return next(version for version in versions if not reason_against(version))
    reason = reason_against(name) if name in versions else f"the operator has only {', '.join(versions)}"
    if reason:
        others = " or ".join(version for version in versions if version != name and not reason_against(version))
        raise SdaError(
            f"{op} cannot run as {name!r} on {device}: {reason}; choose {others}, or let the operator choose."
        )
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
    """The number by which csrc/status.h calls a dtype."""
    return int(getattr(core(), str(dtype).removeprefix("torch.")))


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Inside, the current CUDA device, and so the current stream, is that of x; on the CPU it changes nothing."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _known(name: str, where: str) -> str:
    if name and name not in BACKENDS:
        raise SdaError(f"{where} got {name!r}; choose one of {', '.join(BACKENDS)}.")
    return name


def obstacle(name: str, device: torch.device) -> str:
    """Why the backend does not run on this device; empty if it does."""
    if name == "cpp":
        return "" if device.type == "cpu" else "the C++ version is for the CPU"
    if name == "cuda":
        if device.type != "cuda":
            return "the CUDA version is for NVIDIA GPUs"
        return _cuda_obstacle(_capability(device)) if core().cuda_built else "this installation was built without CUDA"
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if device.type == "cuda":
            return _age(_capability(device))
        interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        return "" if interpreted else "Triton is for GPUs, or for the CPU where TRITON_INTERPRET=1 is set"
    return ""


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _age(capability: tuple[int, int]) -> str:
    """Why a device of this compute capability is too old; empty if it is not."""
    if capability >= OLDEST:
        return ""
    return f"its compute capability is {_dotted(capability)}, below {_dotted(OLDEST)}"


def _cuda_obstacle(capability: tuple[int, int]) -> str:
    """Why the CUDA version, where it was built, does not run on a device of this compute capability."""
    architectures = core().cuda_architectures
    if _age(capability) or _serves(architectures, capability):
        return _age(capability)
    return (
        f"its compute capability is {_dotted(capability)}, and this installation was built for {architectures} "
        "(docs/environment.md says how to build for others)"
    )


def _serves(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for CMake's `architectures`, "80-real 90", runs on a device of this compute capability.

    Machine code (real) runs from its own version on to the end of the major version, PTX (virtual) on everything from
    its version on; a number alone stands for both. Of words such as "native" we do not know what they built: whoever
    chose them is believed.
    """
    for word in architectures.split():
        parts = re.fullmatch(r"(\d+)(\d)(?:-(real|virtual))?", word)
        if parts is None:
            return True
        built, kind = (int(parts[1]), int(parts[2])), parts[3]
        machine_code = kind != "virtual" and built[0] == capability[0]
        if built <= capability and (machine_code or kind != "real"):
            return True
    return False


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
