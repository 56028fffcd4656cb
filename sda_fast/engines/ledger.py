"""What a step costs, counted on its graph: arithmetic, bytes moved, kernels, memory.

The graph is the one that engines take, run operator by operator: every operator reads its inputs from memory and
writes its outputs there. What a compiler fuses moves fewer bytes; a fusion that the graph lacks shows as bytes here.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sda_fast.engines.graph import trace
from sda_fast.engines.memory import peak_bytes, saved_bytes
from sda_fast.engines.steps import GuidedStep, Step

CLASSES = {
    "convolution": {"convolution"},
    "matrix product": {"mm", "addmm", "bmm", "baddbmm"},
    "attention": {
        f"_scaled_dot_product_{kind}_attention{suffix}"
        for kind in ("flash", "efficient", "cudnn")
        for suffix in ("", "_backward", "_for_cpu", "_for_cpu_backward")
    },
    "normalisation": {
        *("group_norm_silu", "group_norm_silu_backward", "native_group_norm", "native_group_norm_backward"),
        *("native_layer_norm", "modulate"),
    },
    "low-pass gradient": {"guidance"},
    "resampling": {
        *("avg_pool2d", "avg_pool2d_backward", "upsample_nearest2d", "upsample_nearest2d_backward"),
    },
    "copy": {"clone", "cat", "stack", "_to_copy", "copy", "constant_pad_nd", "slice_backward", "index_select", "fill"},
    "reduction": {"sum", "mean", "amax", "logsumexp", "_softmax"},
}
ELEMENTWISE = "elementwise"  # all others


@dataclass
class Moved:
    """kernels: operators that move or compute (views do not); read, written: bytes."""

    kernels: int = 0
    read: int = 0
    written: int = 0


@dataclass(frozen=True)
class Ledger:
    """Counts of one run for all images of the batch; a FLOP is a multiplication or an addition, in products alone.

    forward_flops, backward_flops: what the mathematics asks for (the backward pass by the image only). executed_flops:
    what the graph does, with what its backward pass recomputes. moved: by class of operator. saved_bytes: what the
    forward pass keeps for the backward one. peak_bytes: all tensors alive at the worst moment, saved ones included,
    inputs and weights not. weight_bytes: the graph's constants, flipped kernels of the backward pass among them.
    """

    forward_flops: int
    backward_flops: int
    executed_flops: int
    moved: dict[str, Moved]
    saved_bytes: int
    peak_bytes: int
    weight_bytes: int

    @property
    def flops(self) -> int:
        return self.forward_flops + self.backward_flops

    @property
    def total(self) -> Moved:
        values = self.moved.values()
        return Moved(sum(m.kernels for m in values), sum(m.read for m in values), sum(m.written for m in values))


def count(step: Step, example: tuple[Tensor, ...], *, channels_last: bool = True) -> Ledger:
    """Count a run of `step`. Made of fake tensors (`torch._subclasses.FakeTensorMode`), a step needs no memory for it;
    the call must then stand inside the same mode.
    """
    graph = trace(step, example, channels_last=channels_last)
    nodes = list(graph.graph.nodes)
    guided = isinstance(step, GuidedStep)
    turn = len(nodes)
    if guided:
        turn = next(i for i, node in enumerate(nodes) if node.target is torch.ops.sda_fast.guidance.default)
    forward = sum(_flops(node) for node in nodes[:turn])
    total = flops(step, *example)
    return Ledger(
        forward_flops=forward,
        backward_flops=total - forward,
        executed_flops=sum(_flops(node) for node in nodes),
        moved=_moved(nodes),
        saved_bytes=saved_bytes(graph) if guided else 0,
        peak_bytes=peak_bytes(graph),
        weight_bytes=sum(_storages([*graph.parameters(), *graph.buffers()]).values()),
    )


def flops(run: Callable[..., Any], *inputs: Tensor) -> int:
    """What the mathematics of `run(*inputs)` asks for; nothing is computed if the tensors are fake or on `meta`."""
    # With plain attention nothing is recomputed.
    with _Counter() as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        run(*inputs)
    return counter.flops


def _moved(nodes: list[fx.Node]) -> dict[str, Moved]:
    found: dict[str, Moved] = {}
    for node in nodes:
        if not _is_kernel(node):
            continue
        name = cast(torch._ops.OpOverload, node.target)._overloadpacket.__name__
        kind = next((kind for kind, names in CLASSES.items() if name in names), ELEMENTWISE)
        entry = found.setdefault(kind, Moved())
        entry.kernels += 1
        entry.read += sum(_touched(tensor) for used in node.all_input_nodes for tensor in _tensors(used))
        entry.written += sum(_touched(tensor) for tensor in _tensors(node))
    return found


def _is_kernel(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False  # taking one of several outputs
    inputs = _storages(tensor for used in node.all_input_nodes for tensor in _tensors(used))
    outputs = _storages(_tensors(node))
    return bool(outputs.keys() - inputs.keys()) or node.target._schema.is_mutable


def _flops(node: fx.Node) -> int:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda used: used.meta["val"])
    return _formula(node.target, args, kwargs, node.meta.get("val"))


def _formula(target: Any, args: Any, kwargs: Any, result: Any) -> int:
    packet = getattr(target, "_overloadpacket", None)
    return int(flop_registry[packet](*args, **kwargs, out_val=result)) if packet in flop_registry else 0


class _Counter(TorchDispatchMode):
    """FLOPs of what runs. (`FlopCounterMode` keeps accounts by module, and fails where a module is given the very
    tensor that is differentiated for.)"""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.flops += _formula(func, args, kwargs or {}, result)
        return result


def _tensors(node: fx.Node) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(node.meta.get("val")) if isinstance(value, Tensor)]


def _touched(tensor: Tensor) -> int:
    """Bytes of a tensor in memory; what is expanded counts once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of every storage behind tensors."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage.nbytes() for storage in storages}
