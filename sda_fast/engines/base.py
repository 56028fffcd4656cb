"""What every engine is: something that makes a step ready for inputs of fixed shapes."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from sda_fast.engines.batch_size import is_out_of_memory
from sda_fast.engines.steps import ClassifierStep, Step
from sda_fast.errors import SdaError
from sda_fast.numerics import deterministic, tf32_convolutions, timed_convolutions


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

    def check(self, step: Step, device: torch.device) -> None:
        """Raises SdaError, with a way out, for a step or a device that the engine is not for; takes no time."""
        ...

    def prepare(self, step: Step, example: tuple[Tensor, ...]) -> Program:
        """May take minutes (compilation). Raises SdaError, with a way out, where the engine cannot run the step."""
        ...


@contextmanager
def preparing(engine: str) -> Iterator[None]:
    """Raises SdaError for whatever a compiler or runtime raises inside; running out of memory stays what it is."""
    try:
        yield
    except Exception as error:
        if isinstance(error, SdaError) or is_out_of_memory(error):
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise SdaError(
            f'the {engine} engine could not compile this step ({reason}): use --engine eager, or run "sda-fast doctor" '
            "to see what is missing"
        ) from error


def arithmetic_of(
    step: Step, device: torch.device, repeatable: bool = True, timed: bool = False
) -> Callable[[], AbstractContextManager[None]]:
    """What PyTorch keeps to on a GPU while it runs the step, as a context for every run: convolutions in TF32 in half
    precision alone and, if `repeatable`, the same bits in every run, or else, if `timed`, cuDNN's fastest algorithms. A
    classifier's operators may have no version that gives the same bits; they then warn.
    """
    half, any_operators = step.precision != "fp32", isinstance(step, ClassifierStep)

    @contextmanager
    def arithmetic() -> Iterator[None]:
        choice: AbstractContextManager[None] = nullcontext()
        if repeatable:
            choice = deterministic(device, warn_only=any_operators)
        elif timed:
            choice = timed_convolutions(device)
        with choice, tf32_convolutions(device, allowed=half):
            yield

    return arithmetic


def versions() -> dict[str, str]:
    """Of what an engine's result depends on."""
    found = {"torch": str(torch.__version__)}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return found
