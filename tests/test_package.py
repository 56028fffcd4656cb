"""The package as a whole: one name per operator in every layer, framework-free sources, light imports."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sda_fast
from sda_fast import _core, ops

ROOT = Path(__file__).parents[1]

# Where an operator's version in a layer lives, as a pattern of file names.
LAYERS = {
    "kernels": "kernels/{}.py",
    "csrc/cpu": "csrc/cpu/{}.cpp",
    "csrc/cuda": "csrc/cuda/{}.cu",
    "tests": "tests/ops/test_{}.py",
    "benchmarks": "benchmarks/bench_{}.py",
}
# Versions that do not exist, with the reason.
ABSENT = {
    ("benchmarks", "philox_normal"): "the benchmark harness is not there yet",
    ("csrc/cuda", "to_uint8"): "the Triton version is a single elementwise pass, and images are stored off the loop",
}


def names(pattern: str) -> set[str]:
    folder, file = pattern.rsplit("/", 1)
    prefix, suffix = file.split("{}")
    found = {path.name for path in (ROOT / folder).glob(f"{prefix}*{suffix}") if not path.name.startswith("_")}
    return {name.removeprefix(prefix).removesuffix(suffix) for name in found}


OPERATORS = names("sda_fast/ops/{}.py")


@pytest.mark.parametrize("layer", LAYERS)
def test_one_operator_one_name(layer):
    absent = {operator for where, operator in ABSENT if where == layer}
    assert names(LAYERS[layer]) == OPERATORS - absent
    assert absent <= OPERATORS


def test_every_operator_is_public_and_compiled():
    for operator in OPERATORS:
        assert operator in ops.__all__
        if ("csrc/cpu", operator) not in ABSENT:
            assert hasattr(_core, f"{operator}_cpu")
        if ("csrc/cuda", operator) not in ABSENT:
            assert hasattr(_core, f"{operator}_cuda") == _core.cuda_built


def test_sources_know_no_framework():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert len(sources) > 5
    for path in sources:
        if path.name != "bindings.cpp":
            assert not re.search(r"torch|ATen|pybind11|Python\.h", path.read_text()), path


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_import_is_light():
    begin = time.perf_counter()
    loaded = run("import sys, sda_fast; print(*sys.modules)").split()
    assert time.perf_counter() - begin < 2
    heavy = {"torch", "tensorrt", "nvidia.dali", "triton", "numpy", "matplotlib", "timm"}
    assert heavy.isdisjoint(loaded)


def test_importing_kernels_does_not_import_triton():
    assert "triton" not in run("import sys, sda_fast.kernels; print(*sys.modules)").split()


def test_operators_do_not_touch_the_gpu():
    code = "import torch, sda_fast.ops; print(torch.cuda.is_initialized())"
    assert run(code).split() == ["False"]


def test_public_names():
    assert set(sda_fast.__all__) <= set(dir(sda_fast))
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", sda_fast.__version__)
    for name in sda_fast.__all__:
        assert getattr(sda_fast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Proyector'"):
        _ = sda_fast.Proyector
