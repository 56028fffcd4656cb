"""What every engine is: something that makes a step ready for inputs of fixed shapes."""

from typing import Any, Protocol

import torch
from torch import Tensor

from sda_fast.engines.steps import Step


class Program(Protocol):
    """A step made ready by an engine, for one device and inputs shaped as the example it was made with."""

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The step's outputs; they may be overwritten by the next call."""
        ...

    def memory_needed(self) -> int:
        """Bytes of activations and workspace at the peak of a run, and of weights of its own; an estimate."""
        ...

    def describe(self) -> dict[str, Any]:
        """What stands in manifests and benchmark rows: the engine's name, versions and settings; JSON-able."""
        ...


class Engine(Protocol):
    """name: as in `--engine`."""

    name: str

    def prepare(self, step: Step, example: tuple[Tensor, ...]) -> Program:
        """May take minutes (compilation). Raises SdaError, with a way out, where the engine cannot run the step."""
        ...


def versions() -> dict[str, str]:
    """Of what an engine's result depends on."""
    found = {"torch": str(torch.__version__)}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return found
