"""What the operators' tests share: running kernels on the CPU, compiling them for GPUs not at hand."""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # it is no package: its scripts find each other the same way
sys.path.append(str(HERE))  # norms, emulator

import compilation as compilation_module  # noqa: E402  (found by the lines above)
from emulator import build  # noqa: E402

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


@pytest.fixture(scope="session")
def interpret(tmp_path_factory):
    """Calls functions with backend "triton" under Triton's interpreter, in a process of its own, and checks accesses.

    Takes (module, function, args, kwargs) quadruples; returns the results, or the first argument of functions
    that return nothing.
    """

    if importlib.util.find_spec("triton") is None:
        pytest.skip("torch brings no Triton on this system")

    def run(calls):
        folder = tmp_path_factory.mktemp("interpreter")
        torch.save(list(calls), folder / "calls.pt")
        command = [sys.executable, HERE / "interpreter.py", folder / "calls.pt", folder / "results.pt"]
        done = subprocess.run(
            command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return torch.load(folder / "results.pt")

    return run


@pytest.fixture(scope="session")
def emulate(tmp_path_factory):
    """Calls functions with backend "cuda" on the CPU, under the emulator, in a process of its own: in three orders of
    the threads, which must give the same bits, and under the sanitizers of addresses and undefined behaviour.

    Takes and returns what `interpret` does.
    """
    if not build.compiles():
        pytest.skip("there is no C++ compiler")
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    folder = shared / "emulator"
    with (shared / "emulator.lock").open("w") as lock:  # one build for all workers
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "_core.so").exists():
            folder.mkdir(exist_ok=True)
            build.build_module(folder)

    def run(calls):
        there = tmp_path_factory.mktemp("emulator")
        torch.save(list(calls), there / "calls.pt")
        command = [sys.executable, build.HERE / "run.py", folder / "_core.so", there / "calls.pt", there / "results.pt"]
        done = subprocess.run(command, env=build.environment(), cwd=there, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return torch.load(there / "results.pt")

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
