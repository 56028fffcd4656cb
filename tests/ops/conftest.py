"""What the operators' tests share: interpreting Triton kernels, compiling kernels for GPUs not at hand."""

import contextlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

# Triton reads this when a kernel is defined. Kernels are compiled here, and interpreted in other processes.
os.environ.pop("TRITON_INTERPRET", None)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


INTERPRETER = """
import importlib, sys, torch
from sda_fast import ops
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


@dataclass
class Resources:
    """What `ptxas -v` reports of the functions of one compilation."""

    registers: int
    spills: int
    stack: int


def _resources(report: str) -> Resources:
    def largest(pattern):
        return max(int(number) for number in re.findall(pattern, report))

    return Resources(
        registers=largest(r"Used (\d+) registers"),
        spills=largest(r"(\d+) bytes spill"),
        stack=largest(r"(\d+) bytes stack frame"),
    )


@pytest.fixture(scope="session")
def compile_triton():
    """Compiles a Triton kernel to machine code for a compute capability: (cubin, resources). Needs no GPU."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("torch brings no Triton on this system")

    def compile_(kernel, signature, constexprs, capability, **options):
        import triton
        from triton import knobs
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature = {**signature, **dict.fromkeys(constexprs, "constexpr")}
        source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constexprs)
        report = io.StringIO()
        with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(report):
            knobs.compilation.always_compile = True  # a kernel from the cache comes without a report
            knobs.nvidia.dump_ptxas_log = True
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        return compiled.asm["cubin"], _resources(report.getvalue())

    return compile_


@pytest.fixture(scope="session")
def compile_cuda(tmp_path_factory):
    """Compiles a file of csrc/cuda for a compute capability and returns its resources."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed: the CUDA files are neither built nor checked here")

    def compile_(name, capability):
        command = [
            nvcc,
            "-std=c++17",
            "-O3",
            f"-arch=sm_{capability}",
            "-Xptxas",
            "-v",
            "-Werror",
            "all-warnings",
            "-c",
        ]
        target = tmp_path_factory.mktemp("cubin") / "kernel.o"
        done = subprocess.run([*command, ROOT / "csrc" / "cuda" / name, "-o", target], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return _resources(done.stderr)

    return compile_
