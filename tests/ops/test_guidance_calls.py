"""guidance as it is called: registration, tracing, mistakes."""

import pytest
import torch
from lowpasses import CASES, LARGER, Sizes, arguments, assert_same
from torch.fx.experimental.proxy_tensor import make_fx

from sda_fast.errors import SdaError
from sda_fast.ops.guidance import guidance


@pytest.mark.parametrize("sizes", [LARGER[0], LARGER[1], CASES[-1]])
def test_opcheck(sizes):
    args = arguments(sizes)
    torch.library.opcheck(torch.ops.sda_fast.guidance.default, args)
    torch.library.opcheck(torch.ops.sda_fast.guidance_x0.default, args)


def test_tracing_and_compiling():
    def step(*args):
        cotangent, squares, x0 = guidance(*args, return_x0=True)
        return 2 * cotangent, squares.sqrt(), x0

    args = arguments(LARGER[1])
    traced = make_fx(step)(*args)
    assert any(node.target is torch.ops.sda_fast.guidance_x0.default for node in traced.graph.nodes)
    assert_same(traced(*args), step(*args))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same(compiled(*args), step(*args))


NAMES = ("x", "out", "reference_down", "down", "gram", "table", "position")
MISTAKES = {
    "x has shape \\(2, 3, 16\\)": dict(x=torch.zeros(2, 3, 16)),
    "at most 2\\^30 elements per image, so cut": dict(x=torch.zeros(1).expand(1, 3, 20000, 20000)),
    "at most 2\\^31 - 1 rows, so pass fewer images": dict(x=torch.zeros(1).expand(2**28, 2, 4, 4)),
    "square images": dict(x=torch.zeros(2, 3, 16, 15)),
    "out has shape \\(2, 4, 16, 16\\); .* \\[2, 3 or, .* 6, 16, 16\\]": dict(out=torch.zeros(2, 4, 16, 16)),
    "a factor D that divides it": dict(down=torch.zeros(3, 16)),
    "down has shape \\(4, 20\\)": dict(down=torch.zeros(4, 20)),
    "reference_down has shape .* one of shape \\(2, 3, 4, 4\\)": dict(reference_down=torch.zeros(2, 3, 16, 16)),
    "gram has shape": dict(gram=torch.zeros(4, 5)),
    "table has shape \\(100, 3\\); pass guidance Schedule.step_table": dict(table=torch.zeros(100, 3)),
    "table has shape \\(0, 8\\)": dict(table=torch.zeros(0, 8)),
    "position is torch.int32": dict(position=torch.zeros(2, dtype=torch.int32)),
    "position has shape \\(\\)": dict(position=torch.tensor(3)),
    "x is torch.float16; pass guidance one in float32": dict(x=torch.zeros(2, 3, 16, 16).half()),
    "out is torch.float64; .* one in float32, bfloat16 or float16": dict(out=torch.zeros(2, 3, 16, 16).double()),
    "position lies on meta and x on cpu": dict(position=torch.zeros(2, dtype=torch.int64, device="meta")),
    "down has strides .* pass guidance a contiguous one": dict(down=torch.zeros(16, 4).T),
    "out has shape .* and strides .* side by side": dict(out=torch.zeros(2, 3, 16, 32)[..., ::2]),
    "x has shape .* and strides .* pass x.contiguous": dict(x=torch.zeros(2, 3, 16, 16).transpose(2, 3)),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(message):
    args = dict(zip(NAMES, arguments(Sizes(2, 3, 6, 16, 4)), strict=True))
    with pytest.raises(SdaError, match=message):
        guidance(**{**args, **MISTAKES[message]})


@pytest.mark.parametrize("index", [-1, 100, 2**40])
def test_an_index_outside_of_the_table_gives_nan(index):
    *args, position = arguments(CASES[0])
    position = torch.tensor([index, 0])
    _, squares = guidance(*args, position)
    assert squares.isnan().all()
