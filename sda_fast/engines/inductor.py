"""The inductor engine: the traced graph, compiled by PyTorch's own compiler."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor_config

from sda_fast.engines.base import arithmetic_of, preparing, versions
from sda_fast.engines.cuda_graph import CudaGraph
from sda_fast.engines.fusion import fuse_for_gpu
from sda_fast.engines.graph import trace
from sda_fast.engines.memory import peak_bytes
from sda_fast.engines.steps import Step
from sda_fast.engines.winograd import use_winograd
from sda_fast.errors import SdaError
from sda_fast.ops.winograd_convolution import runs as winograd_runs


@dataclass(frozen=True)
class InductorEngine:
    """Images channels_last, norms by this package's operators, weights frozen into the program and packed on the CPU.

    cuda_graphs: replay a run as one CUDA graph (on a GPU). deterministic: on a GPU only algorithms that give the same
    bits in every run. max_autotune, cudnn_benchmark: let the compiler, or cuDNN on a GPU, time its choices, which takes
    longer to prepare and may end otherwise in another process, so on a GPU without `deterministic` alone. winograd: 3x3
    convolutions by minimal filtering, on the CPU in bf16 alone (`engines.winograd`); the same function in real numbers,
    with up to twice the rounding error. fusion: on a GPU, what `engines.fusion` changes in the graph.
    """

    cuda_graphs: bool = True
    deterministic: bool = True
    max_autotune: bool = False
    cudnn_benchmark: bool = False
    winograd: bool = False
    fusion: bool = True
    name = "inductor"

    def check(self, step: Step, device: torch.device) -> None:
        for name in ("max_autotune", "cudnn_benchmark"):
            if getattr(self, name) and self.deterministic and device.type == "cuda":
                raise SdaError(
                    f"{name} times its choices, which may be others in the next process: give deterministic=False "
                    "too, or leave it out"
                )
        if not self.winograd:
            return
        if device.type != "cpu":
            raise SdaError(f"winograd runs on a CPU, not on {device}: leave it out")
        if step.precision != "bf16":
            raise SdaError(f"winograd computes in bf16, not in {step.precision}: choose precision bf16 or leave it out")
        if not winograd_runs():
            raise SdaError("winograd needs AVX512-BF16 instructions, which this processor has not: leave it out")

    def prepare(self, step: Step, example: tuple[Tensor, ...]) -> "InductorProgram":
        self.check(step, example[0].device)
        return InductorProgram(self, step, example)


class InductorProgram:
    def __init__(self, engine: InductorEngine, step: Step, example: tuple[Tensor, ...]):
        self._engine, self._precision = engine, step.precision
        graph = trace(step, example, channels_last=True)
        if engine.winograd and not use_winograd(graph):
            raise SdaError("winograd takes none of this network's convolutions: leave it out")
        device = example[0].device
        arithmetic = arithmetic_of(step, device, engine.deterministic, engine.cudnn_benchmark)
        # On a CPU a convolution adds its bias itself, and sums were measured to cost the same.
        if engine.fusion and device.type == "cuda":
            fuse_for_gpu(graph, products=not engine.max_autotune)  # its own products take what follows them
        self._memory = peak_bytes(graph)
        compiled = torch.compile(graph, dynamic=False, fullgraph=True)

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            first, *rest = inputs
            with arithmetic():
                return compiled(first.contiguous(memory_format=torch.channels_last), *rest)

        # Patched around the first call and not given to torch.compile, which would pass freezing on too late.
        settings = {"freezing": device.type == "cpu", "max_autotune": engine.max_autotune}
        with preparing("inductor"):
            with torch.no_grad(), inductor_config.patch(settings):
                run(*example)
            graphed = engine.cuda_graphs and device.type == "cuda"
            self._run = CudaGraph(run, example).run if graphed else run

    @torch.no_grad()
    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self._run(*inputs)

    def memory_needed(self) -> int:
        return self._memory

    def describe(self) -> dict[str, Any]:
        return {"engine": "inductor", "precision": self._precision, **asdict(self._engine), **versions()}
