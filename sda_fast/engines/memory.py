"""Counts of a step: the memory it needs and what its forward pass keeps for its backward pass."""

from collections.abc import Iterator

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from sda_fast.engines.graph import trace
from sda_fast.engines.steps import GuidedStep, Step


def needed_bytes(step: Step, example: tuple[Tensor, ...], engine: str) -> int:
    """Bytes of all activations alive at the worst moment of a run on that engine."""
    graph = trace(step, example)
    if engine == "eager" and isinstance(step, GuidedStep):
        return peak_bytes(graph) - saved_bytes(graph) + autograd_bytes(step, example)
    return peak_bytes(graph)


def autograd_bytes(step: Step, example: tuple[Tensor, ...]) -> int:
    """Bytes that PyTorch keeps for a backward pass when it runs the step as written: unlike a graph it keeps the inputs
    of convolutions, which frozen weights do not need."""
    kept: dict[int, Tensor] = {}
    weights = {_storage(tensor) for tensor in (*step.parameters(), *step.buffers())}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def keep(tensor: Tensor) -> Tensor:
            kept[_storage(tensor)] = tensor  # the tensor as well, or another could get its place
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            step(*(mode.from_tensor(x) for x in example))
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in weights)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def peak_bytes(graph: fx.GraphModule) -> int:
    """Bytes of all tensors alive at the worst moment, inputs and constants not counted, in the order of the graph."""
    alive, peak = 0, 0
    lifetimes = _lifetimes(graph)
    born: dict[int, list[int]] = {}
    dying: dict[int, list[int]] = {}
    for size, first, last in lifetimes.values():
        born.setdefault(first, []).append(size)
        dying.setdefault(last, []).append(size)
    for i in range(len(graph.graph.nodes)):
        alive += sum(born.get(i, []))
        peak = max(peak, alive)
        alive -= sum(dying.get(i, []))
    return peak


def saved_bytes(graph: fx.GraphModule) -> int:
    """Bytes that a guided step keeps from its forward for its backward pass: alive across the low-pass gradient."""
    nodes = list(graph.graph.nodes)
    turn = next(i for i, node in enumerate(nodes) if node.target is torch.ops.sda_fast.guidance.default)
    return sum(size for size, first, last in _lifetimes(graph).values() if first < turn < last)


def _lifetimes(graph: fx.GraphModule) -> dict[int, tuple[int, int, int]]:
    """Of every storage that a run allocates: its bytes and the indices of the nodes that make it and use it last."""
    found: dict[int, tuple[int, int, int]] = {}
    outside: set[int] = set()
    for i, node in enumerate(graph.graph.nodes):
        for storage, size in _storages(node):
            if node.op in ("placeholder", "get_attr"):
                outside.add(storage)
            elif storage not in outside:
                found.setdefault(storage, (size, i, i))
        for used in [node, *node.all_input_nodes]:
            for storage, _ in _storages(used):
                if storage in found:
                    size, first, _ = found[storage]
                    found[storage] = size, first, i
    return found


def _storages(node: fx.Node) -> Iterator[tuple[int, int]]:
    for value in pytree.tree_leaves(node.meta.get("val")):
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            yield storage._cdata, storage.nbytes()
