"""Builds csrc/cuda for the CPU: `cuda_runtime.h` here stands in for CUDA's own."""

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path

import pybind11

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
FLAGS = ("-std=c++17", "-g", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off")
KERNEL_FLAGS = ("-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", f"-I{HERE}", f"-I{CSRC / 'cuda'}")


@cache
def address_sanitizer() -> Path | None:
    """The library of GCC's address sanitizer, which a process must load first of all; None with another compiler."""
    if not compiles() or "Free Software Foundation" not in _output("--version"):
        return None
    path = Path(_output("-print-file-name=libasan.so").strip())
    return path if path.is_absolute() else None


def compiles() -> bool:
    """Whether there is a C++ compiler."""
    return shutil.which(COMPILER[0]) is not None


def _output(option: str) -> str:
    return subprocess.run([*COMPILER, option], capture_output=True, text=True).stdout


def sanitizers() -> tuple[str, ...]:
    return SANITIZERS if address_sanitizer() else ()


def translated(source: str, name: str) -> str:
    """CUDA C++ in C++: launches and dynamic shared memory are the only syntax that macros do not reach."""
    source = re.sub(r"(\w+)<<<(.*?)>>>\(", r"emulator::launch(\1, \2)(", source, flags=re.DOTALL)
    shared = r"\1* const \2 = emulator::shared_memory<\1>();"
    source = re.sub(r"extern __shared__ (\w+) (\w+)\[\];", shared, source)
    assert "<<<" not in source, f"{name}: a launch that is not understood"
    assert "extern __shared__" not in source, f"{name}: dynamic shared memory that is not understood"
    return f'#line 1 "{name}"\n{source}'


def build_module(folder: Path) -> Path:
    """sda_fast._core with the kernels of csrc/cuda on the CPU, in `folder`: its address."""
    objects = []

    def compile_(source: Path, *flags: str) -> None:
        objects.append(folder / f"{len(objects)}.o")
        run(*COMPILER, *FLAGS, *flags, "-c", source, "-o", objects[-1])

    for path in sorted((CSRC / "cuda").glob("*.cu")):
        source = folder / f"{path.stem}.cpp"
        source.write_text(translated(path.read_text(), str(path)))
        compile_(source, *KERNEL_FLAGS, *sanitizers())
    for path in sorted((CSRC / "cpu").glob("*.cpp")):
        compile_(path, "-O0", "-w")
    python = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}")
    compile_(CSRC / "bindings.cpp", "-O0", '-DSDA_CUDA="80"', *python)
    linked = folder / "linked.so"
    run(*COMPILER, "-shared", *sanitizers(), *objects, "-o", linked)
    return linked.rename(folder / "_core.so")


def run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def environment(**variables: str) -> dict[str, str]:
    """Of a process that loads what was built here."""
    preload = {"LD_PRELOAD": str(address_sanitizer())} if address_sanitizer() else {}
    return {**os.environ, **preload, "ASAN_OPTIONS": "detect_leaks=0", **variables}
