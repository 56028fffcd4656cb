"""What only a GPU would run, on fake tensors of one: shapes, strides and devices, but no values."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sda_fast.bench.baseline import plain_outputs
from sda_fast.cli.commands import _check_device
from sda_fast.engines import DiTStep, UnguidedStep, create_engine
from sda_fast.models import ADM, DiT

GPU = "cuda"
DIT = {"input_size": 16, "patch_size": 4, "in_channels": 3, "hidden_size": 32, "depth": 2, "num_heads": 2}
ADM_SMALL = {"image_size": 16, "model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1}


@pytest.fixture(autouse=True)
def fake_gpu(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr("sda_fast.ops._backend._capability", lambda device: (9, 0))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def made(kind, **config):
    with torch.device(GPU):
        return kind(**config).eval().requires_grad_(False)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_dit(precision, cfg_scale):
    step = DiTStep(made(DiT, **DIT, num_classes=3), cfg_scale, precision)
    example = step.example(2)
    (out,) = create_engine("eager").prepare(step, example).run(*example)
    assert (out.shape[0], out.shape[2:], out.device.type) == (2, (16, 16), GPU)


def test_what_a_benchmark_compares_dit_with():
    network = made(DiT, **DIT, num_classes=3)
    (out,) = plain_outputs(network, (torch.randn(2, 3, 16, 16, device=GPU),), [0, 1], guided=False)
    assert (out.shape[0], out.dtype) == (2, torch.float32)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_adm(precision):
    step = UnguidedStep(made(ADM, **ADM_SMALL, num_head_channels=32, attention_resolutions=(2,)), precision)
    example = step.example(2)
    (out,) = create_engine("eager").prepare(step, example).run(*example)
    assert (out.shape, out.device.type) == ((2, 6, 16, 16), GPU)


@pytest.mark.parametrize("given", ["cuda", "cuda:1"])
@pytest.mark.parametrize("rank", [None, "1"])
def test_the_device_that_a_command_is_given(monkeypatch, given, rank):
    """A GPU without a number is the current one, which cannot be made current by that name."""
    current = []

    def set_device(device):
        assert torch.device(device).index is not None, "as torch.cuda.set_device has it"
        current.append(str(torch.device(device)))

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    numbered = given if rank is None or given != "cuda" else f"cuda:{rank}"
    assert _check_device(given) == numbered
    assert current == ([] if numbered == "cuda" else [numbered])
