"""The winograd option of the inductor engine: what it replaces and leaves, how much it errs, where it is refused."""

import pytest
import torch

from sda_fast.bench.step import relative_error
from sda_fast.diffusion import LowPass
from sda_fast.engines import GuidedStep, UnguidedStep, create_engine
from sda_fast.engines.create import with_winograd
from sda_fast.engines.eager import EagerEngine
from sda_fast.engines.graph import trace
from sda_fast.engines.winograd import use_winograd
from sda_fast.errors import SdaError
from sda_fast.models import load_adm
from sda_fast.ops.winograd_convolution import pack_kernels, runs

convolution, winograd = torch.ops.aten.convolution.default, torch.ops.sda_fast.winograd_convolution.default


@pytest.fixture(scope="module")
def adm(tiny):
    """64 channels at 32x32, 128 at 16x16 and 8x8."""
    sizes = dict(image_size=32, model_channels=64, channel_mult=[1, 2, 2], attention_resolutions=[4])
    return load_adm(tiny.save("adm", "winograd", **sizes)).eval()


@pytest.fixture(scope="module")
def step(adm):
    return GuidedStep(adm, LowPass(32, 4), "bf16")


def example(step, images=2):
    x, *rest = step.example(images)
    return x.contiguous(memory_format=torch.channels_last), *rest


def graph_of(step, images=2):
    return trace(step, example(step, images), channels_last=True)


def test_what_is_replaced(step):
    graph = graph_of(step)
    before = graph.graph.find_nodes(op="call_function", target=convolution)
    replaced = use_winograd(graph)
    after = graph.graph.find_nodes(op="call_function", target=convolution)
    new = graph.graph.find_nodes(op="call_function", target=winograd)
    assert 0 < replaced == len(new) == len(before) - len(after)
    assert all(node.args[1].op == "get_attr" for node in new)  # packed when the graph is made, not in a run
    assert all(node.args[0].meta["val"].shape[2] >= 16 for node in new)
    assert not graph.graph.find_nodes(op="call_function", target=pack_kernels)
    for node in after:
        images, (kernels, channels, *sides) = node.args[0].meta["val"], node.args[1].meta["val"].shape
        too_small = images.shape[2] < 16
        assert sides == [1, 1] or too_small or kernels % 32 or channels % 16 or images.dtype != torch.bfloat16


def test_nothing_is_replaced_in_float32(adm):
    graph = graph_of(GuidedStep(adm, LowPass(32, 4)))
    assert use_winograd(graph) == 0


def test_rounding(adm, step):
    """The error against float32 grows by less than a half."""
    inputs, exact_step = example(step), GuidedStep(adm, LowPass(32, 4))
    exact = EagerEngine().prepare(exact_step, inputs).run(*inputs)
    graph = graph_of(step)
    direct = graph(*inputs)
    assert use_winograd(graph)
    errors = {
        name: (relative_error(a, e), relative_error(b, e))
        for name, a, b, e in zip(step.outputs, graph(*inputs), direct, exact, strict=True)
        if name != "squares"  # one number per image, which can be right by chance
    }
    for ours, before in errors.values():
        assert 0 < ours <= 1.5 * before


@pytest.mark.skipif(not runs(), reason="this processor has no AVX512-BF16 instructions")
def test_the_engine(tiny, monkeypatch):
    """The compiled network errs as much as the graph that it was compiled from."""
    replaced = []

    def count(graph):
        replaced.append(use_winograd(graph))
        return replaced[-1]

    monkeypatch.setattr("sda_fast.engines.inductor.use_winograd", count)
    sizes = dict(model_channels=64, channel_mult=[1], attention_resolutions=[])
    adm = load_adm(tiny.save("adm", "winograd_16", **sizes)).eval()
    step = UnguidedStep(adm, "bf16")
    inputs = step.example(2)
    (exact,) = EagerEngine().prepare(UnguidedStep(adm), inputs).run(*inputs)
    graph = graph_of(step)
    assert use_winograd(graph)
    (expected,) = graph(*example(step))
    program = create_engine("inductor", winograd=True).prepare(step, inputs)
    (out,) = program.run(*inputs)
    assert 0 < relative_error(out, exact) <= 1.5 * relative_error(expected, exact)
    assert replaced[0] > 0
    assert program.describe()["winograd"] is True


def test_where_it_is_refused(adm, step, monkeypatch):
    with pytest.raises(SdaError, match="winograd computes in bf16, not in fp32: choose precision bf16 or leave it out"):
        create_engine("inductor", winograd=True).check(GuidedStep(adm, LowPass(32, 4)), torch.device("cpu"))
    with pytest.raises(SdaError, match="winograd runs on a CPU, not on cuda: leave it out"):
        create_engine("inductor", winograd=True).check(step, torch.device("cuda"))
    monkeypatch.setattr("sda_fast.engines.inductor.winograd_runs", lambda: False)
    with pytest.raises(SdaError, match="AVX512-BF16 instructions, which this processor has not: leave it out"):
        create_engine("inductor", winograd=True).prepare(step, step.example(1))
    create_engine("inductor").check(step, torch.device("cpu"))
    with pytest.raises(SdaError, match="engine 'eager' has no option winograd: choose another engine or leave it out"):
        create_engine("eager", winograd=True)
    with pytest.raises(SdaError, match="winograd is an option of the inductor engine, not of onnx: give both or leave"):
        with_winograd("onnx")


def test_a_network_without_such_convolutions_is_refused(tiny, monkeypatch):
    monkeypatch.setattr("sda_fast.engines.inductor.winograd_runs", lambda: True)
    small = tiny.save("adm", "winograd_small", image_size=8, channel_mult=[1], attention_resolutions=[])
    step = UnguidedStep(load_adm(small), "bf16")
    with pytest.raises(SdaError, match="winograd takes none of this network's convolutions: leave it out"):
        create_engine("inductor", winograd=True).prepare(step, step.example(1))
