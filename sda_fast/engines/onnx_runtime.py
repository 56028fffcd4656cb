"""The onnx engine: ONNX Runtime on the CPU. A check of what TensorRT is given, and an engine of its own."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sda_fast.engines.base import preparing, versions
from sda_fast.engines.graph import trace
from sda_fast.engines.memory import peak_bytes
from sda_fast.engines.onnx_export import export_onnx
from sda_fast.engines.steps import Step
from sda_fast.errors import SdaError


@dataclass(frozen=True)
class OnnxEngine:
    """float32 on the CPU, with as many threads as PyTorch has."""

    name = "onnx"

    def __post_init__(self) -> None:
        try:
            import onnx  # noqa: F401  (and onnxscript, for the export)
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise SdaError(f'the onnx engine needs {error.name}: pip install "sda-fast[onnx]"') from error

    def check(self, step: Step, device: torch.device) -> None:
        if step.precision != "fp32" or device.type != "cpu":
            raise SdaError(
                f"the onnx engine runs fp32 on the CPU, not {step.precision} on {device}: give --engine inductor or "
                "--precision fp32 --device cpu"
            )

    def prepare(self, step: Step, example: tuple[Tensor, ...]) -> "OnnxProgram":
        self.check(step, example[0].device)
        return OnnxProgram(step, example)


class OnnxProgram:
    def __init__(self, step: Step, example: tuple[Tensor, ...]):
        import onnxruntime

        self._step, self._example, self._version = step, example, onnxruntime.__version__
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        with preparing("onnx"), tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "step.onnx"
            export_onnx(step, path, len(example[0]))
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        feed = {name: x.numpy(force=True) for name, x in zip(self._step.inputs, inputs, strict=True)}
        return tuple(torch.from_numpy(y) for y in self._session.run(list(self._step.outputs), feed))

    def memory_needed(self) -> int:
        return peak_bytes(trace(self._step, self._example, "portable"))

    def describe(self) -> dict[str, Any]:
        return {"engine": "onnx", "precision": "fp32", "onnxruntime": self._version, **versions()}
