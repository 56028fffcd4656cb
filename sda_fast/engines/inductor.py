"""The inductor engine: the traced graph, compiled by PyTorch's own compiler."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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

    def prepare(self, step: Step, example: tuple[Tensor, ...]) -> "InductorProgram":
        return InductorProgram(self, step, example)


class InductorProgram:
    def __init__(self, engine: InductorEngine, step: Step, example: tuple[Tensor, ...]):
        self._engine, self._precision = engine, step.precision
        graph = trace(step, example, channels_last=True)
        self._memory = peak_bytes(graph)
        options: dict[str, Any] = {"max_autotune": engine.max_autotune}
        if example[0].device.type == "cpu":
            options["freezing"] = True
        compiled = torch.compile(graph, dynamic=False, fullgraph=True, options=options)

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            first, *rest = inputs
            return compiled(first.contiguous(memory_format=torch.channels_last), *rest)

        with preparing("inductor"), torch.no_grad():
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
