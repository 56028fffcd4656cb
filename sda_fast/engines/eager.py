"""The eager engine: PyTorch runs the step as it is written."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sda_fast.engines.base import arithmetic_of, versions
from sda_fast.engines.memory import needed_bytes
from sda_fast.engines.steps import Step


@dataclass(frozen=True)
class EagerEngine:
    """No preparation, any precision; in half precision images are channels_last, which the operators prefer. On a GPU
    only algorithms that give the same bits in every run, and TF32 in half precision alone."""

    name = "eager"

    def check(self, step: Step, device: torch.device) -> None:
        pass  # any step, any device

    def prepare(self, step: Step, example: tuple[Tensor, ...]) -> "EagerProgram":
        return EagerProgram(step, example)


class EagerProgram:
    def __init__(self, step: Step, example: tuple[Tensor, ...]):
        self._step, self._example = step, example
        self._arithmetic = arithmetic_of(step, example[0].device)
        self._format = torch.contiguous_format if step.precision == "fp32" else torch.channels_last

    @torch.no_grad()
    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        first, *rest = inputs
        with self._arithmetic():
            return self._step(first.contiguous(memory_format=self._format), *rest)

    def memory_needed(self) -> int:
        return needed_bytes(self._step, self._example, "eager")

    def describe(self) -> dict[str, Any]:
        return {"engine": "eager", "precision": self._step.precision, **versions()}
