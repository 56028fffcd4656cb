"""ADM against guided-diffusion's numbers and against the reference UNet, which shares its keys."""

import pytest
import torch

from sda_fast.models import ADM, load_adm
from sda_fast.models import adm as adm_module
from sda_fast.models.checkpoints import ADM_PRESETS
from sda_fast.models.embedding import timestep_embedding
from sda_fast.ops import group_norm_silu
from sda_fast.reference import UNet
from sda_fast.reference.unet import timestep_embedding as reference_embedding

# What ADM takes for granted and UNet does not.
PUBLISHED = {"in_channels": 3, "use_scale_shift_norm": True, "resblock_updown": True}
# Dhariwal & Nichol 2021, tables 4 and 9, in millions; the unconditional model has no class embeddings.
MILLIONS = {
    "imagenet64_cond": 296,
    "imagenet128_cond": 422,
    "imagenet256": 552.8,
    "imagenet256_cond": 554,
    "imagenet512": 558,
    "imagenet512_cond": 559,
}
VARIANTS = {
    "official": {"num_head_channels": 32},
    "class-conditional": {"num_head_channels": 32, "num_classes": 5},
    "plain": {"num_heads": 2, "use_scale_shift_norm": False, "resblock_updown": False, "out_channels": 3},
    "mean pooling": {"num_heads": 2, "resblock_updown": False, "conv_resample": False},
    "new order": {"num_heads": 4, "num_heads_upsample": 2, "use_new_attention_order": True},
    "half width first": {"num_head_channels": 16, "channel_mult": (0.5, 1, 1), "model_channels": 64},
}


def relative(value, expected):
    return float((value - expected).norm() / expected.norm())


def forward_and_vjp(model, x, timesteps, y, cotangent):
    x = x.clone().requires_grad_()
    output = model(x, timesteps, y)
    return output.detach(), *torch.autograd.grad(output, x, cotangent)


@pytest.mark.parametrize("name", ["adm_tiny", "adm_plain_updown", "adm_class_cond"])
def test_output_and_vjp_match_the_original(load_reference, load_weights, name):
    tensors, meta = load_reference(name)
    adm = ADM(**meta["config"]).eval()
    adm.load_state_dict(load_weights(tensors))
    inputs = tensors["x"], tensors["timesteps"], tensors.get("y"), tensors["cotangent"]
    output, vjp = forward_and_vjp(adm, *inputs)
    errors = {"output": relative(output, tensors["output"]), "vjp": relative(vjp, tensors["vjp"])}
    assert max(errors.values()) <= 1e-4, errors


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_the_reference_unet(variant):
    config = {
        **PUBLISHED,
        "image_size": 16,
        "model_channels": 32,
        "out_channels": 6,
        "num_res_blocks": 1,
        "attention_resolutions": (2,),
        "channel_mult": (1, 2),
        **VARIANTS[variant],
    }
    torch.manual_seed(0)
    adm, unet = ADM(**config).eval(), UNet(**config).eval()
    for parameter in adm.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    unet.load_state_dict(adm.state_dict(), strict=True)
    x, cotangent = torch.randn(2, 3, 16, 16), torch.randn(2, config["out_channels"], 16, 16)
    y = torch.tensor([0, 4]) if "num_classes" in config else None
    inputs = x, torch.tensor([3, 750]), y, cotangent
    for ours, theirs in zip(forward_and_vjp(adm, *inputs), forward_and_vjp(unet, *inputs), strict=True):
        assert relative(ours, theirs) <= 1e-4


@pytest.mark.parametrize("preset", ADM_PRESETS)
def test_presets_have_the_published_keys_shapes_and_size(preset):
    with torch.device("meta"):
        adm, unet = ADM(**ADM_PRESETS[preset]), UNet(**{**PUBLISHED, **ADM_PRESETS[preset]})
    shapes = {name: tensor.shape for name, tensor in adm.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in unet.state_dict().items()}
    millions = sum(parameter.numel() for parameter in adm.parameters()) / 1e6
    assert round(millions, 1 if preset == "imagenet256" else None) == MILLIONS[preset]


def test_a_fresh_model_returns_zeros():
    adm = ADM(8, model_channels=32, num_res_blocks=1, attention_resolutions=(1,), channel_mult=(1,), num_heads=2)
    assert not adm(torch.ones(1, 3, 8, 8), torch.tensor([3])).any()


def test_labels_are_asked_for_where_they_are_needed(load_reference):
    tensors, meta = load_reference("adm_class_cond")
    with pytest.raises(ValueError, match="class-conditional: pass y, int64 labels below 10"):
        ADM(**meta["config"])(tensors["x"], tensors["timesteps"])


@pytest.mark.parametrize("dim", [32, 33])
def test_timestep_features_are_those_of_the_reference(dim):
    timesteps = torch.tensor([0, 1, 505, 999])
    features = timestep_embedding(timesteps, dim)
    assert features.shape == (4, dim)
    torch.testing.assert_close(features, reference_embedding(timesteps, dim), rtol=1e-4, atol=1e-4)
    assert torch.equal(features[0, : dim // 2], torch.ones(dim // 2))


def test_channels_last_runs_on_the_operator(tiny, monkeypatch):
    """With the result of contiguous images, forward and back, up to last bits."""
    calls = []

    def counted(*args):
        calls.append(args)
        return group_norm_silu(*args)

    monkeypatch.setattr(adm_module, "group_norm_silu", counted)
    model, timesteps = load_adm(tiny.adm), torch.tensor([3, 700])
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
        out = model(x.requires_grad_(), timesteps)
        results.append((len(calls), out, torch.autograd.grad(out.square().sum(), x)[0]))
    (before, *plain), (after, *fused) = results
    assert before == 0 < after
    for a, b in zip(plain, fused, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
