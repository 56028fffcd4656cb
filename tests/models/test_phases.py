"""Phase convolutions: the function of nearest upsampling and a 3x3 convolution. Their FLOPs: engines/test_ledger.py."""

import pytest
import torch
from torch import nn

from sda_fast.diffusion import LowPass
from sda_fast.engines import GuidedStep, create_engine
from sda_fast.engines.graph import trace
from sda_fast.errors import SdaError
from sda_fast.models import load_adm, with_phase_convolutions
from sda_fast.models.adm import Upsample
from sda_fast.models.phases import PhaseConvolution

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradient_of_one_convolution(layout, size, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 7, 3, padding=1, bias=bias).double()
    x = torch.randn(2, 5, *size, dtype=torch.float64).to(memory_format=FORMATS[layout])
    w = torch.randn(2, 7, 2 * size[0], 2 * size[1], dtype=torch.float64)
    results = []
    for f in (lambda x: conv(Upsample(5, use_conv=False)(x)), PhaseConvolution(conv)):
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        results.append((y, *torch.autograd.grad(y, leaf, w)))
    assert results[1][0].is_contiguous(memory_format=FORMATS[layout])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("convolution", [nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, 2, 1)])
def test_other_convolutions_are_refused(convolution):
    with pytest.raises(SdaError, match="it must be 3x3 with padding 1, stride 1"):
        PhaseConvolution(convolution)


@pytest.mark.parametrize("resblock_updown", [True, False])
def test_a_network_shares_its_weights_and_computes_the_same(tiny, resblock_updown):
    adm = load_adm(tiny.save("adm", f"phases_{resblock_updown}", resblock_updown=resblock_updown))
    phases = with_phase_convolutions(adm)
    assert not any(isinstance(m, PhaseConvolution) for m in adm.modules())
    assert sum(isinstance(m, PhaseConvolution) for m in phases.modules()) == len(adm.config["channel_mult"]) - 1
    theirs, ours = dict(adm.named_parameters()), dict(phases.named_parameters())
    shared = [name for name in ours if ours[name].data_ptr() == theirs[name].data_ptr()]
    assert len(ours) - len(shared) == 2 * (len(adm.config["channel_mult"]) - 1)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([7, 900])
    with torch.no_grad():
        torch.testing.assert_close(phases(x, t), adm(x, t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["graph", "graph of channels_last", "onnx"])
def test_the_guided_step_as_engines_run_it(tiny, how):
    adm = load_adm(tiny.save("adm", "phases", channel_mult=[1, 1], attention_resolutions=[]))
    step, phases = (GuidedStep(a, LowPass(16, 4)) for a in (adm, with_phase_convolutions(adm)))
    example = step.example(3)
    exact = step(*example)
    if how == "onnx":
        found = create_engine("onnx").prepare(phases, example).run(*example)
    else:
        found = trace(phases, example, channels_last="channels_last" in how)(*example)
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
