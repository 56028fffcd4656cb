"""What a traced graph can leave to its norms: sums that would otherwise pass over memory on their own.

A compiler fuses neither into an operator of ours nor into a library's convolution, so on a GPU the bias of a
convolution and the sum of two gradients are kernels of their own. The norm next to them reads or writes the same
numbers anyway.
"""

import torch
from torch import fx

aten, ours = torch.ops.aten, torch.ops.sda_fast
NORM, GRADIENT = ours.group_norm_silu.default, ours.group_norm_silu_backward.default
SOURCE = {NORM: 0, GRADIENT: 1}  # which argument is the norm's x


def fuse_into_norms(graph: fx.GraphModule) -> tuple[int, int]:
    """Gives norms the bias of the convolution before them, and their gradients what is added to these.

    Sums are computed in float32 by the norm and not rounded to the graph's dtype in between. Returns how many biases
    and how many sums were taken.
    """
    convolutions = graph.graph.find_nodes(op="call_function", target=aten.convolution.default)
    biases = sum(_give_bias(node) for node in convolutions)
    sums = sum(_give_residual(graph, node) for node in graph.graph.find_nodes(op="call_function", target=GRADIENT))
    graph.recompile()
    return biases, sums


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
    if len(users) != 1 or users[0].target != aten.add.Tensor or users[0].kwargs:
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


def _alike(a: fx.Node, b: fx.Node) -> bool:
    first, second = a.meta["val"], b.meta["val"]
    return bool((first.shape, first.dtype) == (second.shape, second.dtype))
