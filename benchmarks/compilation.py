"""Compiling kernels for GPUs that are not at hand, and reading what ptxas reports of them."""

import contextlib
import importlib
import io
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CAPABILITIES = (80, 90)
NVCC_OPTIONS = ("-std=c++17", "-O3", "-Xptxas", "-v", "-Werror", "all-warnings", "-c")


@dataclass
class Resources:
    """What one function, or the greediest of several, takes on the device; all but registers in bytes."""

    name: str
    registers: int
    shared: int
    spills: int
    stack: int


def parse(report: str) -> list[Resources]:
    """The functions in the output of `ptxas -v`."""
    functions = []
    for part in re.split(r"Compiling entry function ", report)[1:]:

        def number(pattern: str, part: str = part, default: str | None = None) -> int:
            found = re.findall(pattern, part) or [default]
            return max(int(value) for value in found)  # None, for a line that must be there, raises

        functions.append(
            Resources(
                name=re.match(r"'([^']+)'", part)[1],
                registers=number(r"Used (\d+) registers"),
                shared=number(r"(\d+) bytes smem", default="0"),
                spills=number(r"(\d+) bytes spill"),
                stack=number(r"(\d+) bytes stack frame"),
            )
        )
    return functions


def greediest(functions: list[Resources]) -> Resources:
    """The largest of each number over one or more functions."""
    numbers = ("registers", "shared", "spills", "stack")
    largest = {number: max(getattr(function, number) for function in functions) for number in numbers}
    return Resources(name=", ".join(function.name for function in functions), **largest)


def compile_triton(
    kernel: Any, signature: Mapping[str, str], constexprs: Mapping[str, Any], capability: int, **options: Any
) -> tuple[Any, Resources]:
    """(compiled kernel, resources) for a compute capability.

    signature: the type of every argument that is no constexpr: "i32", "fp32", "*bf16"; with ":16" appended, a
    pointer or integer that is a multiple of 16, as launches specialise them.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {**signature, **dict.fromkeys(constexprs, "constexpr")}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if types[name].endswith(":16")
    }
    types = {name: types[name].removesuffix(":16") for name in kernel.arg_names}
    source = ASTSource(kernel, types, dict(constexprs), attributes)
    report = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(report):
        knobs.compilation.always_compile = True  # a kernel from the cache comes without a report
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    resources = greediest(parse(report.getvalue()))
    resources.shared = max(resources.shared, compiled.metadata.shared)  # dynamic, which ptxas does not know
    return compiled, resources


def compile_cuda(file: Path, capability: int, target: Path) -> list[Resources]:
    """The functions of a .cu file for a compute capability, its object written to `target`.

    Raises RuntimeError with the compiler's words where it refuses the file, FileNotFoundError without nvcc.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("nvcc is not on PATH")
    command = [nvcc, *NVCC_OPTIONS, f"-arch=sm_{capability}", file, "-o", target]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    functions = parse(done.stderr)
    for function, name in zip(functions, _demangled([f.name for f in functions]), strict=True):
        function.name = name
    return functions


def triton_kernels() -> Iterator[tuple[str, tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]]:
    """(operator, (kernel, signature, constexprs, options)) of every module of kernels/ with `compilations()`."""
    for path in sorted((ROOT / "kernels").glob("[!_]*.py")):
        module = importlib.import_module(f"sda_fast.kernels.{path.stem}")
        for compilation in module.compilations() if hasattr(module, "compilations") else ():
            yield path.stem, compilation


def _demangled(names: list[str]) -> list[str]:
    """As C++ writes them, where a demangler is installed, without namespaces and arguments."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return names
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode or len(lines) != len(names):
        return names
    noise = r"^void |\((anonymous namespace|bool|int|long|unsigned int|unsigned long)\)(::)?|<unnamed>::|\b\w+::"
    short = [re.sub(noise, "", line) for line in lines]
    return [re.sub(r"\(\w+\)(?=\d)", "", name).split("(")[0] for name in short]  # "(Order)0" is 0
