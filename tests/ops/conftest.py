"""What the operators' tests share: interpreting Triton kernels, compiling kernels for GPUs not at hand."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # it is no package: its scripts find each other the same way
sys.path.append(str(Path(__file__).parent))  # norms

import compilation as compilation_module  # noqa: E402  (found by the line above)

from sda_fast import ops  # noqa: E402

# Triton reads this when a kernel is defined. Kernels are compiled here, and interpreted in other processes.
os.environ.pop("TRITON_INTERPRET", None)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(params=["cpp", "plain"])
def backend(request):
    """Runs the test once on each backend of the CPU."""
    with ops.backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def empty_is_nan():
    """Outputs and workspaces hold NaN, or the largest integer, before they are written: whoever forgets one is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


INTERPRETER = """
import importlib, sys, torch
from sda_fast import ops
from triton import language as tl
from triton.runtime import interpreter

truncating = interpreter._convert_float

def convert(values, source, target, rounding):
    # To bfloat16 the interpreter truncates, a device rounds to the nearest.
    if (source, target) != (tl.float32, tl.bfloat16):
        return truncating(values, source, target, rounding)
    return torch.from_numpy(values.copy()).bfloat16().view(torch.uint16).numpy()

interpreter._convert_float = convert
torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN
results = []
with ops.backend("triton"):
    for module, function, args, kwargs in torch.load(sys.argv[1]):
        results.append(getattr(importlib.import_module(module), function)(*args, **kwargs))
        if results[-1] is None:
            results[-1] = args[0]
torch.save(results, sys.argv[2])
"""


@pytest.fixture(scope="session")
def interpret(tmp_path_factory):
    """Calls functions with backend "triton" under Triton's interpreter, in a process of its own.

    Takes (module, function, args, kwargs) quadruples; returns the results, or the first argument of functions
    that return nothing.
    """

    if importlib.util.find_spec("triton") is None:
        pytest.skip("torch brings no Triton on this system")

    def run(calls):
        folder = tmp_path_factory.mktemp("interpreter")
        torch.save(list(calls), folder / "calls.pt")
        command = [sys.executable, "-c", INTERPRETER, folder / "calls.pt", folder / "results.pt"]
        done = subprocess.run(
            command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return torch.load(folder / "results.pt")

    return run


@pytest.fixture(scope="session")
def compilation():
    """The module benchmarks/compilation.py, where there is a Triton to compile with."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("torch brings no Triton on this system")
    return compilation_module


@pytest.fixture(scope="session")
def compile_triton():
    """Compiles a Triton kernel to machine code for a compute capability: (cubin, resources). Needs no GPU.

    Takes what a kernel module's `compilations()` yields: (kernel, signature, constexprs, capability, **options).
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("torch brings no Triton on this system")

    def compile_(kernel, signature, constexprs, capability, **options):
        compiled, resources = compilation_module.compile_triton(kernel, signature, constexprs, capability, **options)
        return compiled.asm["cubin"], resources

    return compile_


@pytest.fixture(scope="session")
def compile_cuda(tmp_path_factory):
    """Compiles a file of csrc/cuda for a compute capability and returns the greediest function's resources."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed: the CUDA files are neither built nor checked here")

    def compile_(name, capability):
        target = tmp_path_factory.mktemp("cubin") / "kernel.o"
        return compilation_module.greediest(
            compilation_module.compile_cuda(ROOT / "csrc" / "cuda" / name, capability, target)
        )

    return compile_
