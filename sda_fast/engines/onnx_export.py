"""A step as an ONNX file that TensorRT's parser and ONNX Runtime read.

Weights are stored in the step's own precision, so the file itself says what runs in which dtype. The operators are
those of opset 22, the first in which convolutions may be bfloat16; 23 would bring an Attention that TensorRT cannot
take apart where it has no fused kernel.
"""

import copy
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from sda_fast.engines.graph import trace
from sda_fast.engines.steps import Step
from sda_fast.errors import SdaError

OPSET = 22
DYNAMIC_EXAMPLE = 7  # images; a batch that is no other size of an input, as tracing with an open batch requires
_INLINE_BYTES = 4096  # of a tensor that stays in the file itself: shapes must, and those of a Split have hundreds


class PortableGraph(NamedTuple):
    """What a file is made of: the traced graph and the inputs it was traced with, on the CPU; their names and those of
    the outputs; for an open batch, the dimensions of each input that grow with it."""

    graph: fx.GraphModule
    example: tuple[Tensor, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    growing: tuple[tuple[int, ...], ...] | None


def export_onnx(step: Step, path: Path, batch: int | None) -> None:
    """Write `step` for `batch` images, or for any number if None, as `path`; the rest is as in `write_onnx`."""
    _exporters()  # before the tracing, which takes longer
    write_onnx(portable_graph(step, batch), path)


def portable_graph(step: Step, batch: int | None) -> PortableGraph:
    """The graph of `step` for `batch` images, or for any number if None. Networks on a GPU are copied, as they call
    kernels there that the portable dialect does not know."""
    if any(tensor.is_cuda for tensor in step.parameters()):
        step = copy.deepcopy(step).cpu()
    example = step.example(DYNAMIC_EXAMPLE if batch is None else batch)
    graph = trace(step, example, "portable", dynamic_batch=batch is None)
    growing = None if batch is not None else tuple(map(_differing, example, step.example(1)))
    return PortableGraph(graph, example, step.inputs, step.outputs, growing)


def write_onnx(portable: PortableGraph, path: Path) -> None:
    """Write the graph as `path`, with weights in `<name>.data` beside it.

    Inputs and outputs carry the step's names. The folder must be the file's own, or another export's weights may be
    overwritten. Raises SdaError where onnx or onnxscript is not installed.
    """
    onnx_ir, optimizer = _exporters()
    graph, example, inputs, outputs, growing = portable
    batch = torch.export.Dim("batch", min=1, max=1024)
    shapes = None if growing is None else tuple(dict.fromkeys(dimensions, batch) for dimensions in growing)
    exported = torch.export.export(graph, example, dynamic_shapes=shapes)
    program = torch.onnx.export(
        exported,
        example,
        dynamo=True,
        opset_version=OPSET,
        input_names=list(inputs),
        output_names=list(outputs),
        optimize=False,
        verbose=False,
    )
    assert program is not None
    # torch's own call of the optimizer infers shapes with onnx, which copies all weights and cannot pass 2 GB.
    optimizer.optimize(program.model, num_iterations=2, onnx_shape_inference=False)
    _match_kernels(program.model)
    onnx_ir.save(program.model, path, external_data=f"{path.name}.data", size_threshold_bytes=_INLINE_BYTES)


def _exporters() -> tuple[ModuleType, ModuleType]:
    try:
        import onnx  # noqa: F401  (torch wants it)
        import onnx_ir
        import onnxscript.optimizer
    except ImportError as error:
        raise SdaError('ONNX export needs onnx and onnxscript: pip install "sda-fast[onnx]"') from error
    return onnx_ir, onnxscript.optimizer


def _match_kernels(model: Any) -> None:
    """In place: the optimizer folds batch norms into convolutions in float32, and leaves them so beside half images."""
    import onnx_ir

    for node in model.graph:
        if node.op_type == "Conv":
            dtype = node.inputs[0].dtype
            for value in node.inputs[1:]:
                if value is not None and value.dtype != dtype:
                    value.const_value = onnx_ir.tensor(value.const_value.numpy().astype(dtype.numpy()), name=value.name)
                    value.dtype = dtype


def _differing(x: Tensor, y: Tensor) -> tuple[int, ...]:
    return tuple(i for i, (n, m) in enumerate(zip(x.shape, y.shape, strict=True)) if n != m)
