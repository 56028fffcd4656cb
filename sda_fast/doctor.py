"""What works on this machine, and for what does not, the one command that would change it."""

import importlib.util
import platform
from importlib.metadata import version
from typing import Any


def diagnose() -> list[dict[str, Any]]:
    """One finding per part: {"part", "works", "detail"}."""
    import torch

    from sda_fast import __version__

    findings = [_finding("sda-fast", True, f"{__version__} on Python {platform.python_version()}")]
    findings.append(_finding("torch", True, torch.__version__))
    try:
        import sda_fast._core as core

        findings.append(_finding("C++ operators", True, "compiled"))
        detail = "compiled" if core.cuda_built else "not compiled: install again with nvcc on the PATH"
        findings.append(_finding("CUDA operators", bool(core.cuda_built), detail))
    except ImportError as error:
        findings.append(_finding("C++ operators", False, f"{error}: pip install . (needs a C++ compiler)"))
    gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else "none found; everything here runs on the CPU"
    findings.append(_finding("NVIDIA GPU", gpu, name))
    findings += [_optional(*part) for part in _OPTIONAL]
    return findings


_OPTIONAL = (
    ("Triton kernels", "triton", "pip install triton"),
    ("photographs testbed", "imagecorruptions", 'pip install "sda-fast[photos]"'),
)


def _optional(part: str, module: str, command: str) -> dict[str, Any]:
    if importlib.util.find_spec(module) is None:
        return _finding(part, False, f"not installed: {command}")
    try:
        return _finding(part, True, f"{module} {version(module)}")
    except Exception:  # installed under another distribution name
        return _finding(part, True, f"{module} is installed")


def _finding(part: str, works: bool, detail: str) -> dict[str, Any]:
    return {"part": part, "works": works, "detail": detail}
