"""A step as one inference graph: forward and backward in ATen operators and ours, weights as constants, no autograd.

Tracing runs the step once on fake tensors. Two dialects: "native" keeps the operators of this package, for engines that
run PyTorch; "portable" has ATen alone, in operators that ONNX and TensorRT know.
"""

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from sda_fast.engines.decompositions import NATIVE, PORTABLE
from sda_fast.engines.steps import Step

aten = torch.ops.aten
Dialect = Literal["native", "portable"]


def trace(
    step: Step,
    example: tuple[Tensor, ...],
    dialect: Dialect = "native",
    *,
    channels_last: bool = False,
    dynamic_batch: bool = False,
) -> fx.GraphModule:
    """The graph of `step` for inputs shaped as `example`; its placeholders and outputs in the order of the step's.

    Whatever depends on weights alone (flipped kernels of the backward convolutions among it) is computed here; the
    step's own weights stay as they are. channels_last: of all images and kernels. dynamic_batch: leave the batch
    open, in whichever dimension it stands; that of `example` must then differ from every other size of an input,
    because sizes that are equal are taken for one.
    """
    table = NATIVE if dialect == "native" else PORTABLE
    mode: Literal["symbolic", "fake"] = "symbolic" if dynamic_batch else "fake"
    if channels_last:
        example = tuple(_channels_last(x) for x in example)
    # In this thread, whose own the modes of tracing are; gradients on a GPU would have another.
    with torch.no_grad(), _fused_attention(), torch.autograd.set_multithreading_enabled(False):
        graph = make_fx(step, decomposition_table=dict(table), tracing_mode=mode, _allow_non_fake_inputs=True)(*example)
    _remove_detach(graph)
    fold_constants(graph)
    if channels_last:
        for node in graph.graph.find_nodes(op="get_attr"):
            value = _attribute(graph, node.target)
            if isinstance(value, Tensor) and value.dim() == 4:
                _set_constant(graph, node, _channels_last(value))
        _delete_unused_constants(graph)
        graph.recompile()
    return graph


def _fused_attention() -> AbstractContextManager[None]:
    """Without the plain version, which keeps its probabilities: the tables below take the fused one apart."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def fold_constants(graph: fx.GraphModule) -> None:
    """Replace what depends on constants alone by its value."""
    values: dict[fx.Node, Any] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            values[node] = _attribute(graph, node.target)
        elif node.op == "call_function" and node.all_input_nodes and all(n in values for n in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
            values[node] = node.target(*args, **kwargs)
    for node, value in values.items():
        if node.op == "call_function" and isinstance(value, Tensor) and any(user not in values for user in node.users):
            _set_constant(graph, node, value.detach().contiguous())  # no view: a kernel of its own
    graph.graph.eliminate_dead_code()
    _delete_unused_constants(graph)
    graph.recompile()


def _set_constant(graph: fx.GraphModule, node: fx.Node, value: Tensor) -> None:
    name = f"constant_{node.name}"
    graph.register_buffer(name, value)
    with graph.graph.inserting_before(node):
        constant = graph.graph.get_attr(name)
    constant.meta.update(node.meta)
    node.replace_all_uses_with(constant)
    graph.graph.erase_node(node)


def _attribute(module: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def _delete_unused_constants(graph: fx.GraphModule) -> None:
    used = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    for name in [*graph._parameters, *graph._buffers, *(n for n in vars(graph) if n.startswith("_tensor_constant"))]:
        if name not in used:
            delattr(graph, name)


def _remove_detach(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        if node.target in (aten.detach.default, aten.alias.default):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
