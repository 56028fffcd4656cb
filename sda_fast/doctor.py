"""What works on this machine, and for what does not, the one command that would change it."""

import platform
from importlib.metadata import PackageNotFoundError, version
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


# By distribution, not by module: the older imagecorruptions has the module of the one we need.
_OPTIONAL = (
    ("DALI reader", ("nvidia-dali-cuda130",), 'pip install "sda-fast[dali]"'),
    ("Triton kernels", ("triton",), "pip install triton"),
    (
        "photographs testbed",
        ("scikit-image", "scikit-learn", "imagecorruptions-imaug"),
        'pip install "sda-fast[photos]"',
    ),
    ("latent decoding", ("diffusers",), 'pip install "sda-fast[vae]"'),
    ("DiffPure's SDE", ("torchsde",), 'pip install "sda-fast[diffpure]"'),
)


def _optional(part: str, distributions: tuple[str, ...], command: str) -> dict[str, Any]:
    found = []
    for name in distributions:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            return _finding(part, False, f"{name} is not installed: {command}")
    return _finding(part, True, ", ".join(found))


def _finding(part: str, works: bool, detail: str) -> dict[str, Any]:
    return {"part": part, "works": works, "detail": detail}
