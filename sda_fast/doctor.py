"""What works on this machine, and for what does not, why and the one command that would change it."""

import importlib.util
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

Finding = dict[str, Any]


def diagnose(attempt: bool = False) -> list[Finding]:
    """One finding per part: {"part", "works", "detail"}; attempt: run a tiny step on every engine that could work, and
    compare it with float32, in place of looking for what it needs."""
    import torch

    from sda_fast import __version__

    gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else "none found; everything here runs on the CPU"
    findings = [
        _finding("sda-fast", True, f"{__version__} on Python {platform.python_version()}"),
        _finding("torch", True, torch.__version__),
        _finding("NVIDIA GPU", gpu, name),
        *_operators(gpu),
        *_engines(gpu),
        *_decoders(gpu),
        *(_optional(*part) for part in _OPTIONAL),
    ]
    if attempt:
        findings = [_attempted(finding, gpu) for finding in findings]
    return findings


# By distribution, not by module: the older imagecorruptions has the module of the one we need.
_OPTIONAL = (
    (
        "photographs testbed",
        ("scikit-image", "scikit-learn", "imagecorruptions-imaug"),
        'pip install "sda-fast[photos]"',
    ),
    ("latent decoding", ("diffusers",), 'pip install "sda-fast[vae]"'),
    ("DiffPure's SDE", ("torchsde",), 'pip install "sda-fast[diffpure]"'),
    ("Grad-CAM", ("grad-cam",), 'pip install "sda-fast[report]"'),
)
_NO_GPU = "no NVIDIA GPU was found"


def _operators(gpu: bool) -> list[Finding]:
    findings = []
    try:
        import sda_fast._core as core

        winograd = "" if core.winograd_convolution_cpu_runs() else " but for winograd_convolution: no AVX512-BF16 here"
        findings.append(_finding("C++ operators", True, f"compiled{winograd}"))
        detail = "compiled" if core.cuda_built else "not compiled: install again with nvcc on the PATH"
        cuda = _finding("CUDA operators", core.cuda_built, detail)
        findings.append(_on_the_gpu(cuda, "cuda", _NO_GPU, gpu))
    except ImportError as error:
        findings.append(_finding("C++ operators", False, f"{error}: pip install . (needs a C++ compiler)"))
    triton = _optional("Triton operators", ("triton",), "pip install triton")
    return [*findings, _on_the_gpu(triton, "triton", f"{triton['detail']}, but {_NO_GPU}", gpu)]


def _on_the_gpu(finding: Finding, backend: str, without: str, gpu: bool) -> Finding:
    """The finding, or why what is installed does not run here; `without`: what to say where there is no GPU."""
    if not finding["works"]:
        return finding
    if not gpu:
        return _finding(finding["part"], False, without)
    import torch

    from sda_fast.ops._backend import obstacle

    reason = obstacle(backend, torch.device("cuda", torch.cuda.current_device()))
    return _finding(finding["part"], False, reason) if reason else finding


def _engines(gpu: bool) -> list[Finding]:
    findings = [_finding("engine eager", True, "PyTorch alone")]
    if gpu:
        findings.append(_optional("engine inductor", ("triton",), "pip install triton"))
    else:
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        found = shutil.which(compiler)
        missing = f"the C++ compiler {compiler} was not found: apt-get install g++ (or set CXX)"
        findings.append(_finding("engine inductor", found is not None, found or missing))
    extra = 'pip install "sda-fast[{}]"'.format
    findings.append(_optional("engine onnx", ("onnx", "onnxscript", "onnxruntime"), extra("onnx")))
    trt = _optional("engine trt", ("tensorrt", "onnx", "onnxscript"), extra("trt"))
    if not gpu:
        trt = _finding("engine trt", False, _NO_GPU)
    elif importlib.util.find_spec("sda_fast.engines.tensorrt") is None:
        trt = _finding("engine trt", False, "this version of sda-fast has none")
    return [*findings, trt]


def _decoders(gpu: bool) -> list[Finding]:
    pillow = _optional("decoder Pillow", ("pillow",), "pip install pillow")
    dali = _optional("decoder DALI (CPU)", ("nvidia-dali-cuda130",), 'pip install "sda-fast[dali]"')
    on_gpu = {**dali, "part": "decoder DALI (GPU)"}
    if not gpu:
        on_gpu = _finding("decoder DALI (GPU)", False, _NO_GPU)
    return [pillow, dali, on_gpu]


def _optional(part: str, distributions: tuple[str, ...], command: str) -> Finding:
    found = []
    for name in distributions:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            return _finding(part, False, f"{name} is not installed: {command}")
    return _finding(part, True, ", ".join(found))


def _attempted(finding: Finding, gpu: bool) -> Finding:
    """What a guided step of a tiny model says of an engine that is said to work."""
    kind, _, engine = finding["part"].partition(" ")
    if kind != "engine" or not finding["works"]:
        return finding
    from sda_fast.bench import TINY, bench_step, random_model

    device = "cuda" if gpu and engine != "onnx" else "cpu"
    try:
        row = bench_step(random_model(*TINY["adm"]), "tiny", engine=engine, device=device, repeats=1)
    except Exception as error:  # whatever an engine's library raises: that it does is the finding
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return _finding(finding["part"], False, f"{finding['detail']}; {reason}")
    if "failed" in row:
        return _finding(finding["part"], False, f"{finding['detail']}; {row['failed']}")
    detail = f"{finding['detail']}; a tiny step is right (prepared in {row['prepare_seconds']:.1f} s)"
    return _finding(finding["part"], True, detail)


def _finding(part: str, works: bool, detail: str) -> Finding:
    return {"part": part, "works": bool(works), "detail": detail}
