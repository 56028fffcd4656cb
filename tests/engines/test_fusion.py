"""What norms take over from the graph around them: which sums, which not, and the same numbers afterwards."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from sda_fast.bench import random_model
from sda_fast.bench.profile import profile_kernels
from sda_fast.bench.step import relative_error
from sda_fast.diffusion import LowPass
from sda_fast.engines import GuidedStep
from sda_fast.engines.eager import EagerEngine
from sda_fast.engines.fusion import GRADIENT, NORM, SPLIT_GRADIENT, Fused, fuse_for_gpu
from sda_fast.engines.graph import trace
from sda_fast.models import ADM

aten = torch.ops.aten
CONVOLUTION, ADD, SLICE = aten.convolution.default, aten.add.Tensor, aten.slice.Tensor


@pytest.fixture(scope="module")
def adm():
    sizes = dict(model_channels=64, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,))
    return random_model(ADM, dict(image_size=32, num_head_channels=64, **sizes)).eval()


def graph_of(adm, precision):
    step = GuidedStep(adm, LowPass(32, 4), precision)
    inputs = step.example(4)
    return step, inputs, trace(step, inputs, channels_last=True)


def nodes(graph, target):
    return graph.graph.find_nodes(op="call_function", target=target)


def is_norms_bias(node):
    return node.args[2] is not None and {user.target for user in node.users} <= {NORM, GRADIENT}


def is_summed(node):
    return [user.target for user in node.users] == [ADD]


def test_what_norms_take(adm):
    _, _, graph = graph_of(adm, "bf16")
    with_bias = sum(map(is_norms_bias, nodes(graph, CONVOLUTION)))
    summed, adds = sum(map(is_summed, nodes(graph, GRADIENT))), len(nodes(graph, ADD))
    convolutions, gradients = len(nodes(graph, CONVOLUTION)), len(nodes(graph, GRADIENT))
    concatenations = len(adm.output_blocks)
    assert len(nodes(graph, SLICE)) == 2 * concatenations
    biases, sums, cuts, _ = fuse_for_gpu(graph)
    assert 0 < biases == with_bias
    assert 0 < sums <= summed
    assert cuts == concatenations
    assert not nodes(graph, SLICE)
    assert len(nodes(graph, ADD)) == adds - sums
    after = nodes(graph, GRADIENT) + nodes(graph, SPLIT_GRADIENT)
    assert (len(nodes(graph, CONVOLUTION)), len(after)) == (convolutions, gradients)
    assert not any(map(is_norms_bias, nodes(graph, CONVOLUTION)))
    # The forward and the backward pass of a norm are given one bias.
    given = [sum("x_bias" in node.kwargs for node in some) for some in (nodes(graph, NORM), after)]
    assert given == [biases, biases]
    assert sum("residual" in node.kwargs for node in after) == sums
    # What is left to add to a gradient is added to one that has its residual, or has another shape or dtype.
    for node in filter(is_summed, after):
        assert "residual" in node.kwargs or len({a.meta["val"].dtype for a in next(iter(node.users)).args}) > 1
    graph.graph.lint()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_numbers(adm, precision):
    """In float32 but for rounding; in half precision about as far from float32 as before."""
    step, inputs, graph = graph_of(adm, precision)
    before = graph(*inputs)
    fuse_for_gpu(graph)
    after = graph(*inputs)
    exact = EagerEngine().prepare(GuidedStep(adm, LowPass(32, 4)), inputs).run(*inputs)
    for name, a, b, e in zip(step.outputs, after, before, exact, strict=True):
        if precision == "fp32":
            assert relative_error(a, b) < 1e-5
        elif name != "squares":  # one number per image, which can be right by chance
            # A pixel that rounding takes over the edge of [-1, 1] changes the gradient by itself.
            assert 0 < relative_error(a, e) <= (1.05 if name == "out" else 1.5) * relative_error(b, e)


def test_the_compiler_takes_it(adm):
    _, inputs, graph = graph_of(adm, "fp32")
    inputs = (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:])
    fuse_for_gpu(graph)
    expected = graph(*inputs)
    with torch.no_grad():
        found = torch.compile(graph, dynamic=False, fullgraph=True)(*inputs)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-5


def norm(x, weight, bias):
    return NORM(x, weight, bias, 4, 1e-5, None, None, True)


def gradient(dy, x, weight, bias):
    _, mean, rstd = norm(x, weight, bias)
    return GRADIENT(dy, x, weight, bias, mean, rstd, None, None, 4, True)


def slices(dx, *spans):
    return [dx[:, start:end] for start, end in spans]


# Of x [2, 8, 4, 4], what a convolution makes of it, and a norm's weight and bias; with what is fused.
CASES = {
    "a convolution before a norm": (lambda x, h, w, b: norm(h, w, b)[0], (1, 0, 0)),
    "and before its gradient": (lambda x, h, w, b: gradient(x, h, w, b), (1, 0, 0)),
    "that others see as well": (lambda x, h, w, b: (norm(h, w, b)[0], h + x), (0, 0, 0)),
    "that is a norm's cotangent": (lambda x, h, w, b: gradient(h, x, w, b), (0, 0, 0)),
    "that is its own cotangent": (lambda x, h, w, b: gradient(h, h, w, b), (0, 0, 0)),
    "a gradient and another": (lambda x, h, w, b: gradient(x, x, w, b) + h, (0, 1, 0)),
    "another and a gradient": (lambda x, h, w, b: h + gradient(x, x, w, b), (0, 1, 0)),
    "a gradient and itself": (lambda x, h, w, b: torch.add(*[gradient(x, x, w, b)] * 2), (0, 0, 0)),
    "a gradient and a number": (lambda x, h, w, b: gradient(x, x, w, b) + 1.5, (0, 0, 0)),
    "a gradient and a vector": (lambda x, h, w, b: gradient(x, x, w, b) + h[:1], (0, 0, 0)),
    "a gradient and float64": (lambda x, h, w, b: gradient(x, x, w, b) + h.double(), (0, 0, 0)),
    "a gradient and twice another": (lambda x, h, w, b: torch.add(gradient(x, x, w, b), h, alpha=2), (0, 0, 0)),
    "a gradient that others see": (lambda x, h, w, b: (lambda dx: (dx + h, dx))(gradient(x, x, w, b)), (0, 0, 0)),
    "a gradient and two others": (lambda x, h, w, b: gradient(x, x, w, b) + h + x, (0, 1, 0)),
    "a gradient in two": (lambda x, h, w, b: slices(gradient(x, x, w, b), (0, 6), (6, 8)), (0, 0, 1)),
    "a sum in two": (lambda x, h, w, b: slices(gradient(x, x, w, b) + h, (4, 8), (0, 4)), (0, 1, 1)),
    "a gradient in three": (lambda x, h, w, b: slices(gradient(x, x, w, b), (0, 2), (2, 6), (6, 8)), (0, 0, 0)),
    "parts that overlap": (lambda x, h, w, b: slices(gradient(x, x, w, b), (0, 6), (4, 8)), (0, 0, 0)),
    "parts that leave some": (lambda x, h, w, b: slices(gradient(x, x, w, b), (0, 4), (5, 8)), (0, 0, 0)),
    "one part": (lambda x, h, w, b: slices(gradient(x, x, w, b), (0, 4)), (0, 0, 0)),
    "rows": (lambda x, h, w, b: (lambda dx: (dx[:, :, :2], dx[:, :, 2:]))(gradient(x, x, w, b)), (0, 0, 0)),
    "every other channel": (lambda x, h, w, b: (lambda dx: (dx[:, ::2], dx[:, 4:]))(gradient(x, x, w, b)), (0, 0, 0)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_left_alone(case):
    function, expected = CASES[case]
    torch.manual_seed(0)
    x, kernel, offset, weight, bias = (torch.randn(*s) for s in ((2, 8, 4, 4), (8, 8, 1, 1), *[(8,)] * 3))

    def network(x):
        return function(x, torch.conv2d(x, kernel, offset), weight, bias)

    graph = make_fx(network)(x)
    before = tree_leaves(graph(x))
    assert fuse_for_gpu(graph) == Fused(*expected)
    assert fuse_for_gpu(graph) == Fused()  # nothing is taken twice
    for a, b in zip(tree_leaves(graph(x)), before, strict=True):
        assert (a - b).abs().max() < 1e-5


def product(x, weight, bias):
    return torch.addmm(bias, x, weight)


def tanh_gelu(x):
    return F.gelu(x, approximate="tanh")


GELUS = {
    "tanh's": (lambda x, w, b: tanh_gelu(product(x, w, b)), 1),
    "of a view": (lambda x, w, b: tanh_gelu(product(x, w, b).view(2, 2, 8)) + 1, 1),
    "the exact one": (lambda x, w, b: F.gelu(product(x, w, b)), 0),
    "of what others see": (lambda x, w, b: (lambda y: (tanh_gelu(y), y + 1))(product(x, w, b)), 0),
    "of a product without a bias": (lambda x, w, b: tanh_gelu(x @ w), 0),
    "of a matrix's sum with a product": (lambda x, w, b: tanh_gelu(torch.addmm(x, x, w)), 0),
    "of half a product": (lambda x, w, b: tanh_gelu(torch.addmm(b, x, w, alpha=0.5)), 0),
    "of no product": (lambda x, w, b: tanh_gelu(x), 0),
}


@pytest.mark.parametrize("case", GELUS)
def test_gelu(case):
    network, expected = GELUS[case]
    torch.manual_seed(0)
    x, weight, bias = torch.randn(4, 8), torch.randn(8, 8), torch.randn(8)
    graph = make_fx(network)(x, weight, bias)
    before = tree_leaves(graph(x, weight, bias))
    assert fuse_for_gpu(graph, products=False) == Fused()
    assert fuse_for_gpu(graph) == Fused(gelus=expected)
    for node in nodes(graph, aten._addmm_activation.default):  # on a CPU it is the exact one
        assert node.kwargs == {"use_gelu": True}
        node.target, node.kwargs = (lambda b, x, w: tanh_gelu(torch.addmm(b, x, w))), {}
    graph.recompile()
    for a, b in zip(tree_leaves(graph(x, weight, bias)), before, strict=True):
        assert (a - b).abs().max() < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gelu_of_a_product_on_the_device(dtype):
    """As DiT-XL/2 asks for it: tanh's approximation, in half precision by the product's own kernel."""
    x, weight, bias = (torch.randn(s, device="cuda").to(dtype) for s in ((2048, 1152), (4608, 1152), 4608))
    weight = (weight / 34).T

    def run():
        return aten._addmm_activation(bias, x, weight, use_gelu=True)

    exact = tanh_gelu(product(x.double(), weight.double(), bias.double()))
    plain = tanh_gelu(product(x, weight, bias))
    assert relative_error(run(), exact) <= 1.1 * relative_error(plain, exact)
    kernels = [row["name"] for row in profile_kernels(run, "cuda")]
    assert dtype == torch.float32 or not [name for name in kernels if "elementwise" in name], kernels
