"""A step on an engine, whatever the batch: programs are prepared when they are first needed, and kept."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from sda_fast.engines.base import Engine, Program
from sda_fast.engines.batch_size import is_out_of_memory, smaller_batch
from sda_fast.engines.create import create_engine
from sda_fast.engines.steps import Step


class Runner:
    """Call it like the step; the first call with another number of images may take minutes. The step goes where its
    inputs are."""

    def __init__(self, step: Step, engine: str | Engine):
        """engine: itself, or its name. Raises SdaError for a name that is not known and an engine not installed."""
        self.step = step
        self.engine = create_engine(engine) if isinstance(engine, str) else engine
        self._programs: dict[tuple[Any, ...], Program] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        device = inputs[0].device
        key = (device, *(x.shape for x in inputs))
        if key not in self._programs:
            if any(tensor.device != device for tensor in (*self.step.parameters(), *self.step.buffers())):
                self.forget()
                self.step.to(device)
            self._programs[key] = self.engine.prepare(self.step, inputs)
        return self._programs[key].run(*inputs)

    def forget(self) -> None:
        """Drop the programs and what memory they hold."""
        self._programs.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def describe(self) -> dict[str, Any]:
        """Of the latest program; the engine's name alone before the first call."""
        *_, last = [None, *self._programs.values()]
        return {"engine": self.engine.name} if last is None else last.describe()


class Batched(Protocol):
    """What takes images in batches: `batch_size` of them or all at once, a multiple of `batch_unit`."""

    batch_size: int | None
    network: Runner

    @property
    def batch_unit(self) -> int: ...


def halving(run: Batched, images: int, call: Callable[[], Tensor]) -> Tensor:
    """What `call` returns; where memory runs out, `run.batch_size` is halved, for good, and it is called again."""
    while True:
        try:
            return call()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            run.batch_size = smaller_batch(run.batch_size or images, error, run.batch_unit)
        run.network.forget()  # not above, where the error's traceback keeps all tensors of the failed run
