"""A step as an ONNX file that TensorRT's parser and ONNX Runtime read.

Weights are stored in the step's own precision, so the file itself says what runs in which dtype. The operators are
those of opset 22, the first in which convolutions may be bfloat16; 23 would bring an Attention that TensorRT cannot
take apart where it has no fused kernel.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from sda_fast.engines.graph import trace
from sda_fast.engines.steps import Step
from sda_fast.errors import SdaError

OPSET = 22
DYNAMIC_EXAMPLE = 7  # images; a batch that is no other size in a step, as tracing with an open batch requires
_INLINE_BYTES = 4096  # of a tensor that stays in the file itself: shapes must, and those of a Split have hundreds


def export_onnx(step: Step, path: Path, batch: int | None) -> None:
    """Write `step` for `batch` images, or for any number if None, as `path`, with weights in `<name>.data` beside it.

    Inputs and outputs carry the step's names. The folder must be the file's own, or another export's weights may be
    overwritten. Raises SdaError where onnx or onnxscript is not installed.
    """
    try:
        import onnx  # noqa: F401  (torch wants it)
        import onnx_ir
        import onnxscript.optimizer
    except ImportError as error:
        raise SdaError('ONNX export needs onnx and onnxscript: pip install "sda-fast[onnx]"') from error
    graph, example = portable_graph(step, batch)
    exported = torch.export.export(graph, example, dynamic_shapes=_dynamic_shapes(example) if batch is None else None)
    program = torch.onnx.export(
        exported,
        example,
        dynamo=True,
        opset_version=OPSET,
        input_names=list(step.inputs),
        output_names=list(step.outputs),
        optimize=False,
        verbose=False,
    )
    assert program is not None
    # torch's own call of the optimizer infers shapes with onnx, which copies all weights and cannot pass 2 GB.
    onnxscript.optimizer.optimize(program.model, num_iterations=2, onnx_shape_inference=False)
    _match_kernels(program.model)
    onnx_ir.save(program.model, path, external_data=f"{path.name}.data", size_threshold_bytes=_INLINE_BYTES)


def portable_graph(step: Step, batch: int | None) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """What `export_onnx` makes a file of, and the inputs it was traced with, all on the CPU: networks on a GPU call
    kernels that the portable dialect does not know."""
    if any(tensor.is_cuda for tensor in step.parameters()):
        step = copy.deepcopy(step).cpu()
    example = step.example(DYNAMIC_EXAMPLE if batch is None else batch)
    return trace(step, example, "portable", dynamic_batch=batch is None), example


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


def _dynamic_shapes(example: tuple[Tensor, ...]) -> tuple[dict[int, object] | None, ...]:
    batch = torch.export.Dim("batch", min=1, max=1024)
    return tuple({0: batch} if len(x) == DYNAMIC_EXAMPLE else None for x in example)
