"""What operators of a traced graph take over from their neighbours on a GPU, instead of passes over memory.

A compiler fuses nothing into an operator of ours, nor into a library's convolution or matrix product. So the bias of a
convolution and the sum of two gradients are kernels of their own, and where a gradient is cut into those of
concatenated images, a convolution has its part copied: the norm next to them reads or writes the same numbers anyway.
The products of DiT's MLP write what GELU reads again, and cuBLAS can apply it before it writes.
"""

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

aten, ours = torch.ops.aten, torch.ops.sda_fast
NORM, GRADIENT = ours.group_norm_silu.default, ours.group_norm_silu_backward.default
SPLIT_GRADIENT = ours.group_norm_silu_backward_split.default
VIEWS = (aten.view.default, aten._unsafe_view.default)
SOURCE = {NORM: 0, GRADIENT: 1}  # which argument is the norm's x


class Fused(NamedTuple):
    """How many of each."""

    biases: int = 0
    sums: int = 0
    cuts: int = 0
    gelus: int = 0


def fuse_for_gpu(graph: fx.GraphModule, *, products: bool = True) -> Fused:
    """Gives norms the bias of the convolution before them, their gradients what is added to these and where they are
    cut, and products (if asked for) the GELU after them. What is added or applied is computed in float32 and not
    rounded to the graph's dtype in between. On a CPU the graph computes another GELU afterwards."""

    def nodes(target: Any) -> list[fx.Node]:
        return list(graph.graph.find_nodes(op="call_function", target=target))

    biases = sum(_give_bias(node) for node in nodes(aten.convolution.default))
    sums = sum(_give_residual(graph, node) for node in nodes(GRADIENT))
    cuts = sum(_cut(graph, node) for node in nodes(GRADIENT))
    gelus = sum(_give_gelu(graph, node) for node in nodes(aten.gelu.default)) if products else 0
    graph.recompile()
    return Fused(biases, sums, cuts, gelus)


def _give_bias(convolution: fx.Node) -> bool:
    """Only norms may see the convolution's result, which lacks the bias afterwards."""
    x, weight, bias, *rest = convolution.args
    users = list(convolution.users)
    if bias is None or not users or not all(_normalises(user, convolution) for user in users):
        return False
    convolution.args = (x, weight, None, *rest)
    for user in users:
        user.kwargs = {**user.kwargs, "x_bias": bias}
    return True


def _normalises(node: fx.Node, x: fx.Node) -> bool:
    if node.target not in SOURCE or "x_bias" in node.kwargs:
        return False
    return [i for i, argument in enumerate(node.args) if argument is x] == [SOURCE[node.target]]


def _give_residual(graph: fx.GraphModule, gradient: fx.Node) -> bool:
    users = list(gradient.users)
    if "residual" in gradient.kwargs or len(users) != 1 or users[0].target != aten.add.Tensor or users[0].kwargs:
        return False
    total = users[0]
    others = [a for a in total.args if a is not gradient]
    if len(others) != 1 or not isinstance(others[0], fx.Node) or not _alike(others[0], gradient):
        return False
    with graph.graph.inserting_before(total):  # where the residual is known
        instead = graph.graph.call_function(GRADIENT, gradient.args, {**gradient.kwargs, "residual": others[0]})
    instead.meta.update(gradient.meta)
    total.replace_all_uses_with(instead)
    graph.graph.erase_node(total)
    graph.graph.erase_node(gradient)
    return True


def _cut(graph: fx.GraphModule, gradient: fx.Node) -> bool:
    """Only two slices of channels that make up the whole may see the gradient."""
    channels = gradient.meta["val"].shape[1]
    users = sorted(gradient.users, key=lambda user: _span(user, channels))
    spans = [_span(user, channels) for user in users]
    first = spans[0][1] if spans else 0
    if spans != [(0, first), (first, channels)] or first == 0:
        return False
    with graph.graph.inserting_before(gradient):
        both = graph.graph.call_function(SPLIT_GRADIENT, (*gradient.args, first), gradient.kwargs)
    both.meta["val"] = tuple(user.meta["val"] for user in users)
    for i, user in enumerate(users):
        with graph.graph.inserting_before(user):
            part = graph.graph.call_function(operator.getitem, (both, i))
        part.meta.update(user.meta)
        user.replace_all_uses_with(part)
        graph.graph.erase_node(user)
    graph.graph.erase_node(gradient)
    return True


def _span(node: fx.Node, channels: int) -> tuple[int, int]:
    """Start and end of a slice of channels; (0, 0) of anything else."""
    if node.target != aten.slice.Tensor or len(node.args) != 4 or node.kwargs or node.args[1] != 1:
        return 0, 0
    _, _, start, end = node.args
    assert isinstance(start, int)
    assert isinstance(end, int)
    return start, min(end, channels)


def _give_gelu(graph: fx.GraphModule, gelu: fx.Node) -> bool:
    """The approximation by tanh, which is what PyTorch's operator computes on a GPU (on a CPU it is the exact one)."""
    (seen,) = gelu.args
    assert isinstance(seen, fx.Node)
    product = seen.args[0] if seen.target in VIEWS else seen
    if gelu.kwargs != {"approximate": "tanh"} or not isinstance(product, fx.Node):
        return False
    if product.target != aten.addmm.default or product.kwargs or {len(seen.users), len(product.users)} != {1}:
        return False
    if product.args[0].meta["val"].dim() != 1:  # type: ignore[union-attr]
        return False
    with graph.graph.inserting_before(product):
        instead = graph.graph.call_function(aten._addmm_activation.default, product.args, {"use_gelu": True})
    instead.meta.update(product.meta)
    product.replace_all_uses_with(instead)
    gelu.replace_all_uses_with(instead if seen is product else seen)
    graph.graph.erase_node(gelu)
    graph.graph.erase_node(product)
    return True


def _alike(a: fx.Node, b: fx.Node) -> bool:
    first, second = a.meta["val"], b.meta["val"]
    return bool((first.shape, first.dtype) == (second.shape, second.dtype))
