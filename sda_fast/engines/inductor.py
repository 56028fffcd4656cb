"""The inductor engine: the traced graph, compiled by PyTorch's own compiler."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor_config

from sda_fast.engines.base import preparing, versions
from sda_fast.engines.cuda_graph import CudaGraph
from sda_fast.engines.graph import trace
from sda_fast.engines.memory import peak_bytes
from sda_fast.engines.steps import Step


@dataclass(frozen=True)
class InductorEngine:
    """Images channels_last, norms by this package's operators, weights frozen into the program and packed on the CPU.

    cuda_graphs: replay a run as one CUDA graph (on a GPU). max_autotune: let the compiler time its choices, which
    takes much longer to prepare.
    """

    cuda_graphs: bool = True
    max_autotune: bool = False
    name = "inductor"

    def check(self, step: Step, device: torch.device) -> None:
        pass  # any step, any device

    def prepare(self, step: Step, example: tuple[Tensor, ...]) -> "InductorProgram":
        return InductorProgram(self, step, example)


class InductorProgram:
    def __init__(self, engine: InductorEngine, step: Step, example: tuple[Tensor, ...]):
        self._engine, self._precision = engine, step.precision
        graph = trace(step, example, channels_last=True)
        self._memory = peak_bytes(graph)
        compiled = torch.compile(graph, dynamic=False, fullgraph=True)

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            first, *rest = inputs
            return compiled(first.contiguous(memory_format=torch.channels_last), *rest)

        # Patched around the first call and not given to torch.compile, which would pass freezing on too late.
        settings = {"freezing": example[0].device.type == "cpu", "max_autotune": engine.max_autotune}
        with preparing("inductor"), torch.no_grad(), inductor_config.patch(settings):
            run(*example)
        graphed = engine.cuda_graphs and example[0].is_cuda
        self._run = CudaGraph(run, example).run if graphed else run

    @torch.no_grad()
    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self._run(*inputs)

    def memory_needed(self) -> int:
        return self._memory

    def describe(self) -> dict[str, Any]:
        settings = {"cuda_graphs": self._engine.cuda_graphs, "max_autotune": self._engine.max_autotune}
        return {"engine": "inductor", "precision": self._precision, **settings, **versions()}
