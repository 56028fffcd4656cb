"""Traced graphs: what is in them, what tracing leaves alone, open batches, and cotangents in float16."""

import math

import pytest
import torch

from sda_fast.diffusion import LowPass
from sda_fast.diffusion.guidance import Guided
from sda_fast.engines import GuidedStep
from sda_fast.engines.graph import trace
from sda_fast.models import load_adm

aten = torch.ops.aten
DIALECTS = pytest.mark.parametrize("dialect", ["native", "portable"])
PLAIN = {"use_scale_shift_norm": False, "resblock_updown": False, "use_new_attention_order": True, "out_channels": 3}


@pytest.fixture(scope="module", params=[{}, PLAIN], ids=["published", "plain"])
def step(request, tiny):
    return GuidedStep(load_adm(tiny.save("adm", f"graph_{len(request.param)}", **request.param)), LowPass(16, 4))


@pytest.fixture(scope="module")
def graphs(step):
    """Of two images, by dialect."""
    return {dialect: trace(step, step.example(2), dialect) for dialect in ("native", "portable")}


def calls(graph):
    return [node for node in graph.graph.nodes if node.op == "call_function"]


def attribute(graph, node):
    module, _, name = node.target.rpartition(".")
    return getattr(graph.get_submodule(module), name)


@DIALECTS
def test_a_graph_is_an_inference_graph(graphs, dialect):
    graph = graphs[dialect]
    assert not any(p.requires_grad for p in [*graph.parameters(), *graph.buffers()])
    called = {node.target for node in calls(graph)}
    assert not called & {aten.detach.default, aten.alias.default, aten.convolution_backward.default}
    namespaces = {target.namespace for target in called if isinstance(target, torch._ops.OpOverload)}
    assert namespaces <= ({"aten", "sda_fast"} if dialect == "native" else {"aten"})
    constant = [n for n in calls(graph) if n.all_input_nodes and all(i.op == "get_attr" for i in n.all_input_nodes)]
    assert not constant
    assert len(graph.graph.find_nodes(op="placeholder")) == len(GuidedStep.inputs)


@DIALECTS
def test_kernels_are_constants_both_ways(step, graphs, dialect):
    """No flipped, transposed or converted weights are computed in a run: a convolution's kernel is a constant."""
    graph = graphs[dialect]
    convolutions = [node for node in calls(graph) if node.target == aten.convolution.default]
    kernels = [node.args[1] for node in convolutions]
    assert all(kernel.op == "get_attr" and attribute(graph, kernel).is_contiguous() for kernel in kernels)
    forward = sum(isinstance(m, torch.nn.Conv2d) for m in step.adm.modules())
    assert len(convolutions) == 2 * forward
    assert sum(node.args[6] for node in convolutions) == sum(
        isinstance(m, torch.nn.Conv2d) and m.stride == (2, 2) for m in step.adm.modules()
    )  # a transposed convolution for each strided one, and no other


@pytest.mark.parametrize("options", [{}, {"channels_last": True}, {"dialect": "portable"}])
def test_tracing_leaves_the_model_alone(step, options):
    def state():
        return {name: (t.clone(), t.stride(), t.data_ptr()) for name, t in step.state_dict().items()}

    before = state()
    trace(step, step.example(2), **options)
    for name, (value, stride, address) in state().items():
        assert torch.equal(value, before[name][0])
        assert (stride, address) == before[name][1:], name


@DIALECTS
def test_tracing_twice_gives_the_same_graph(step, graphs, dialect):
    again = trace(step, step.example(2), dialect)
    assert again.code == graphs[dialect].code
    ours, theirs = again.state_dict(), graphs[dialect].state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_one_trace_serves_any_batch(step):
    graph = trace(step, step.example(7), "portable", dynamic_batch=True)
    for batch in (1, 3, 16):
        example = step.example(batch)
        for ours, expected in zip(graph(*example), step(*example), strict=True):
            assert ours.shape == expected.shape
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def adm(tiny):
    return load_adm(tiny.adm)


class Faint(LowPass):
    """A low-pass filter whose gradient, bit for bit, is 2**-bits times the true one."""

    def __init__(self, size, factor, bits):
        super().__init__(size, factor)
        self.gain = 2.0 ** (-bits / 2)  # the gradient holds G twice

    def matrices(self, x):
        down, up, gram = super().matrices(x)
        return down, up, gram * self.gain


def guided(adm, bits, precision="fp16", dialect=None, scaled=True):
    step = GuidedStep(adm, Faint(16, 4, bits), precision)
    if not scaled:
        step.precision = "fp32"  # of the step alone: its network stays as it is
    example = step.example(2)
    return Guided(*(step if dialect is None else trace(step, example, dialect))(*example))


def test_a_cotangent_too_small_for_float16_survives(adm):
    expected, faint = guided(adm, 0), guided(adm, 32)
    assert faint.cotangent.abs().max() < 2**-25  # half of float16's smallest number: all of it would become zero
    assert torch.equal(faint.through_network * 2**32, expected.through_network)
    assert not guided(adm, 32, scaled=False).through_network.any()
    # Some of an image at the usual size is as small, which scaling to one saves as well.
    exact = guided(adm, 0, "fp32").through_network
    error, unscaled = (
        (guided(adm, 12, scaled=scaled).through_network * 2**12 - exact).norm() for scaled in (True, False)
    )
    assert error < 0.5 * unscaled


@pytest.mark.parametrize("bits", [100, 132, 144])
def test_next_to_no_residual_gives_next_to_nothing(adm, bits):
    """Down to float32's own smallest numbers, where powers of two end."""
    terms, expected = guided(adm, bits), guided(adm, 0)
    assert terms.through_network.isfinite().all()
    # The cotangents there are whole multiples of 2^-149, of which an element of the product gathers a few.
    bound = 2.0 ** (1 - bits) * expected.through_network.abs().max() + 2.0**-145
    assert terms.through_network.abs().max() <= bound


@pytest.mark.parametrize(("precision", "run"), [("fp32", None), ("fp16", None), ("fp16", "portable")])
def test_no_residual_gives_zeros(adm, precision, run):
    terms = guided(adm, math.inf, precision, run)
    for zeros in (terms.cotangent, terms.through_network, terms.squares):
        assert torch.equal(zeros, torch.zeros_like(zeros))
