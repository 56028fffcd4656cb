"""A run of fixed shapes as one CUDA graph: a thousand launches become one."""

from collections.abc import Callable

import torch
from torch import Tensor

_WARM_UPS = 3  # libraries choose algorithms and allocate workspaces in their first calls, which cannot be captured


class CudaGraph:
    """Captures `function` on inputs of its own; every `run` copies its inputs there, replays, and returns the same
    outputs, which the next run overwrites."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], example: tuple[Tensor, ...]):
        self._inputs = tuple(x.clone() for x in example)
        self._function = function  # owns the weights whose addresses the graph holds
        self._device = example[0].device
        # Streams and captures are of the current device, which need not be the inputs'.
        with torch.cuda.device(self._device), torch.no_grad():
            self._graph = torch.cuda.CUDAGraph()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    function(*self._inputs)
            torch.cuda.current_stream().wait_stream(stream)
            # Other threads may use the GPU meanwhile, to decode images.
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._outputs = function(*self._inputs)

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.cuda.device(self._device):
            for own, given in zip(self._inputs, inputs, strict=True):
                own.copy_(given)
            self._graph.replay()
        return self._outputs
