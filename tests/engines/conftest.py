"""TensorRT and a GPU that are none."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # fake_tensorrt
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # onnx_rules, engines

HANDLE = 77


class FakeGpu:
    """The CPU in place of a GPU: work is done when it is queued. captured: how many runs had been made before each
    capture."""

    captured: list[int]

    def __init__(self, device: torch.device):
        self.runs, self.captured = 0, []

    def identity(self) -> dict[str, str]:
        return {"gpu": "A", "capability": "9.0", "multiprocessors": "132", "driver": "D", "cuda": "13"}

    def current(self):
        return nullcontext()

    @contextmanager
    def queue(self) -> Iterator[int]:
        self.runs += 1
        yield HANDLE

    def capture(self, enqueue: Callable[[int], None]) -> Callable[[int], None]:
        self.captured.append(self.runs)
        return enqueue


@pytest.fixture
def trt(monkeypatch):
    """trt(version): `import tensorrt` gives a FakeTensorRT, and the engine runs on a FakeGpu."""
    pytest.importorskip("onnxruntime")
    from fake_tensorrt import FakeTensorRT

    def install(version: str = "10.13.3.9") -> FakeTensorRT:
        fake = FakeTensorRT(version)
        monkeypatch.setitem(sys.modules, "tensorrt", fake)
        monkeypatch.setattr("sda_fast.engines.tensorrt.Gpu", FakeGpu)
        return fake

    return install
