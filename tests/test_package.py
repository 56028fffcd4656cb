"""The package as a whole: light imports, public names."""

import re
import subprocess
import sys
import time

import pytest

import sda_fast


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
