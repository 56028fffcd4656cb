"""The `winograd` option of the inductor engine: which convolutions of a traced graph are computed that way."""

import torch
from torch import fx

from sda_fast.engines.graph import fold_constants
from sda_fast.ops.winograd_convolution import CHANNELS, KERNELS, pack_kernels

aten = torch.ops.aten
ONCE, SAME = [1, 1], [1, 1]  # stride and dilation; padding
SMALLEST = 16  # pixels on a side; for fewer, reading the transformed kernels, 16 numbers for 9, takes the time


def use_winograd(graph: fx.GraphModule) -> int:
    """Replaces those convolutions of `graph` that `winograd_convolution` takes, of images of at least SMALLEST by
    SMALLEST pixels, with kernels packed into constants. Returns how many."""
    found = [n for n in graph.graph.find_nodes(op="call_function", target=aten.convolution.default) if _fits(n)]
    for node in found:
        x, weight, bias, *_ = node.args
        with graph.graph.inserting_before(node):
            packed = graph.graph.call_function(pack_kernels, (weight,))
            instead = graph.graph.call_function(torch.ops.sda_fast.winograd_convolution.default, (x, packed, bias))
        instead.meta.update(node.meta)
        node.replace_all_uses_with(instead)
        graph.graph.erase_node(node)
    fold_constants(graph)
    return len(found)


def _fits(convolution: fx.Node) -> bool:
    x, weight, _, stride, padding, dilation, transposed, _, groups = convolution.args
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    if weight.op != "get_attr" or (stride, padding, dilation, transposed, groups) != (ONCE, SAME, ONCE, False, 1):
        return False
    images, (kernels, channels, *sides) = x.meta["val"], weight.meta["val"].shape
    height, width = images.shape[2:]
    return (
        images.dtype == torch.bfloat16
        and sides == [3, 3]
        and (kernels % KERNELS, channels % CHANNELS, height % 2, width % 2) == (0, 0, 0, 0)
        and min(height, width) >= SMALLEST
    )
