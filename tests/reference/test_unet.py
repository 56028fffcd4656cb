"""The reference UNet against guided-diffusion's numbers, and the published costs it must keep."""

import pytest
import torch

from sda_fast.reference import UNet
from sda_fast.reference.unet import AttentionBlock, GroupNorm32

CONFIGS = ["adm_tiny", "adm_plain_updown", "adm_class_cond"]


@pytest.fixture
def build(load_reference, load_weights):
    def build(name):
        tensors, meta = load_reference(name)
        model = UNet(**meta["config"]).eval()
        model.load_state_dict(load_weights(tensors), strict=True)
        return model, tensors

    return build


def relative(a, b):
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


@pytest.mark.parametrize("name", CONFIGS)
def test_output_and_vjp_match_the_original(build, name):
    model, tensors = build(name)
    x = tensors["x"].clone().requires_grad_()
    output = model(x, tensors["timesteps"], tensors.get("y"))
    (vjp,) = torch.autograd.grad(output, x, tensors["cotangent"])
    assert relative(output.detach(), tensors["output"]) < 1e-5
    assert relative(vjp, tensors["vjp"]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_torso(build, dtype):
    model, tensors = build("adm_tiny")
    model.convert_torso(dtype)
    assert model.input_blocks[1][0].in_layers[2].weight.dtype == dtype
    kept = [
        model.input_blocks[1][0].in_layers[0],
        model.input_blocks[1][0].emb_layers[1],
        model.time_embed[0],
    ]
    assert all(layer.weight.dtype == torch.float32 for layer in [*kept, model.out[2]])
    x = tensors["x"].clone().requires_grad_()
    output = model(x, tensors["timesteps"])
    (vjp,) = torch.autograd.grad(output, x, tensors["cotangent"])
    assert output.dtype == vjp.dtype == torch.float32
    # A handful of roundings per block: within 20 units of the last place of the torso's format.
    tolerance = 20 * torch.finfo(dtype).eps
    assert relative(output.detach(), tensors["output"]) < tolerance
    assert relative(vjp, tensors["vjp"]) < tolerance


def test_group_norm_computes_in_float32():
    norm = GroupNorm32(32)
    x = (torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(0)) * 1e-3 + 100).half()
    assert torch.equal(norm(x), norm(x.float()).half())


def test_attention_is_recomputed_and_weights_require_grad(build, monkeypatch):
    model, tensors = build("adm_tiny")
    assert all(p.requires_grad for p in model.parameters())
    calls = []
    attend = AttentionBlock.attend
    monkeypatch.setattr(AttentionBlock, "attend", lambda self, x: calls.append(1) or attend(self, x))
    x = tensors["x"].clone().requires_grad_()
    output = model(x, tensors["timesteps"])
    forward = len(calls)
    assert forward == sum(isinstance(m, AttentionBlock) for m in model.modules())
    torch.autograd.grad(output.sum(), x)
    assert len(calls) == 2 * forward


def test_resampling_without_convolutions_has_no_parameters():
    model = UNet(16, 3, 32, 3, 1, attention_resolutions=[], channel_mult=(1, 2), conv_resample=False)
    assert not any(".op." in key or key.endswith("conv.weight") for key in model.state_dict())
    assert model(torch.zeros(1, 3, 16, 16), torch.tensor([3])).shape == (1, 3, 16, 16)


def test_fresh_model_returns_zeros():
    # The last layer of the model and of every residual branch starts at zero.
    model = UNet(8, 3, 32, 6, 1, attention_resolutions=[1], channel_mult=(1,), num_heads=2)
    assert not model(torch.ones(1, 3, 8, 8), torch.tensor([3])).any()


def test_labels_and_conditioning_must_agree(build):
    conditional, tensors = build("adm_class_cond")
    with pytest.raises(ValueError, match="num_classes"):
        conditional(tensors["x"], tensors["timesteps"])
    unconditional, tensors = build("adm_tiny")
    with pytest.raises(ValueError, match="num_classes"):
        unconditional(tensors["x"], tensors["timesteps"], torch.tensor([0, 1]))


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="heads"):
        AttentionBlock(64, 3, new_order=False)
