"""DiT and VAE as diffusers saves them, against diffusers' own modules by output."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from sda_fast.errors import SdaError
from sda_fast.models import load_dit
from sda_fast.models.vae import load_vae
from sda_fast.weights import weights_path

diffusers = pytest.importorskip("diffusers", reason='needs pip install "sda-fast[vae]"')

DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 3,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
    "norm_eps": 1e-6,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        scale = 1 / tensor[0].numel() ** 0.5 if tensor.ndim > 1 else 0.2
        offset = 1.0 if "norm" in name and name.endswith("weight") and tensor.ndim == 1 else 0.0
        tensor.copy_(offset + scale * torch.randn(tensor.shape, generator=generator))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def dit():
    """A random DiTTransformer2DModel that shares its embedders between blocks, as every published one does."""
    model = randomised(diffusers.DiTTransformer2DModel(**DIT))
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


@pytest.fixture
def pipeline(dit, tmp_path):
    """The folder of a DiT pipeline, its transformer in place."""
    dit.save_pretrained(tmp_path / "DiT" / "transformer")
    return tmp_path / "DiT"


def inputs(sample_size=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, sample_size, sample_size, generator=generator)
    return x, torch.tensor([0, 17, 999]), torch.tensor([0, 9, 10])  # 10 is the null class


def test_dit_gives_diffusers_outputs(dit, pipeline, monkeypatch):
    x, t, y = inputs()
    converted = load_dit(pipeline)
    assert not converted.training
    assert (converted.out_channels, converted.num_classes) == (8, 10)
    # At step 0 without a change to diffusers; elsewhere its 128 frequencies end at 1/10000, where those that the
    # published models were trained with (Peebles & Xie's code) end one short of it.
    still = torch.zeros_like(t)
    assert (converted(x, still, y) - dit(x, still, y).sample).abs().max() <= 1e-5
    assert (converted(x, t, y) - dit(x, t, y).sample).abs().max() > 1e-3
    for block in dit.transformer_blocks:
        monkeypatch.setattr(block.norm1.emb.time_proj, "downscale_freq_shift", 0)
    expected = dit(x, t, y).sample
    assert expected.std() > 0.1
    assert (converted(x, t, y) - expected).abs().max() <= 1e-5


def test_the_epsilon_of_published_folders(dit, tmp_path):
    """They say 1e-5 for the second norm of a block, where the original has 1e-6."""
    published = diffusers.DiTTransformer2DModel(**{**DIT, "norm_eps": 1e-5}).eval()
    published.load_state_dict(dit.state_dict())
    published.save_pretrained(tmp_path)
    x, t, y = inputs()
    still = torch.zeros_like(t)
    assert (load_dit(tmp_path)(x, still, y) - published(x, still, y).sample).abs().max() <= 1e-5


def test_every_way_to_name_the_folder(pipeline):
    transformer = pipeline / "transformer"
    first = load_dit(pipeline).state_dict()
    for path in (transformer, transformer / WEIGHTS, weights_path(pipeline), weights_path(transformer)):
        assert all(torch.equal(tensor, first[name]) for name, tensor in load_dit(path).state_dict().items())
    torch.save(load_file(transformer / WEIGHTS), transformer / "diffusion_pytorch_model.bin")
    (transformer / WEIGHTS).unlink()
    assert all(torch.equal(tensor, first[name]) for name, tensor in load_dit(pipeline).state_dict().items())


def test_what_diffusers_called_its_dit_before(pipeline):
    config = pipeline / "transformer" / "config.json"
    config.write_text(config.read_text().replace("DiTTransformer2DModel", "Transformer2DModel"))
    assert load_dit(pipeline).num_classes == 10


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(SdaError, match=r"holds no diffusion_pytorch_model\.safetensors, neither itself nor in trans"):
        load_dit(tmp_path)
    with pytest.raises(SdaError, match=r"nor in vae/"):
        load_vae(tmp_path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"_class_name": "AutoencoderKL"}, "describes a AutoencoderKL instead of a DiTTransformer2DModel"),
        ({"activation_fn": "geglu"}, r"cannot be converted to a DiT \(its activation is geglu\)"),
        ({"num_layers": 2}, r"is not the DiT of its config\.json \(blocks\.2\S+ is not one of its keys; 0 missing"),
        ({"sample_size": None}, "describes a model that this version cannot build"),
        ({"num_embeds_ada_norm": 11}, r"embedding_table\.weight has shape \[11, 48\] instead of \[12, 48\]"),
    ],
)
def test_configurations_that_do_not_fit(pipeline, change, problem):
    config = pipeline / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(SdaError, match=problem):
        load_dit(pipeline)


def test_damaged_configurations(pipeline):
    for content in ("{", "[]", "{}"):
        (pipeline / "transformer" / "config.json").write_text(content)
        with pytest.raises(SdaError, match=r"config\.json does not describe a diffusers model"):
            load_dit(pipeline)
    (pipeline / "transformer" / "config.json").unlink()
    with pytest.raises(SdaError, match=r"does not say how its DiT is built \(it looks like a diffusers DiT\)"):
        load_dit(pipeline)


def test_embedders_that_differ_between_blocks(pipeline):
    state = load_file(pipeline / "transformer" / WEIGHTS)
    state["transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"] += 1
    save_file(state, pipeline / "transformer" / WEIGHTS)
    with pytest.raises(SdaError, match=r"transformer_blocks\.2\.norm1\S+ is not equal to transformer_blocks\.0"):
        load_dit(pipeline)


@pytest.fixture(scope="module")
def vae():
    """A small AutoencoderKL with every kind of layer of Stability's: attention, two reductions."""
    return randomised(
        diffusers.AutoencoderKL(
            block_out_channels=(16, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            norm_num_groups=8,
        )
    )


def test_vae_decodes_as_diffusers(vae, tmp_path):
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    latents = 0.2 * torch.randn(3, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    expected = vae.decode(latents / 0.18215).sample.clamp(-1, 1)
    assert (expected.abs() < 1).float().mean() > 0.05
    loaded = load_vae(tmp_path / "pipeline")
    assert (loaded.decode(latents) - expected).abs().max() <= 1e-5
    assert loaded.decode(latents).shape == (3, 3, 24, 32)
    assert loaded.decode(latents[:0]).shape == (0, 3, 24, 32)
    assert torch.equal(loaded.decode(latents)[1:2], loaded.decode(latents[1:2]))
    assert loaded.scale == 0.18215


def test_vae_with_the_names_of_older_files(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, tensor in load_file(tmp_path / WEIGHTS).items():
        for new, old in names.items():
            key = key.replace(f".{new}.", f".{old}.")
        state[key] = tensor
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in state
    save_file(state, tmp_path / WEIGHTS)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["scaling_factor"]  # older than it, too
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_vae(tmp_path / WEIGHTS)
    for name, tensor in vae.state_dict().items():
        assert torch.equal(loaded.autoencoder.state_dict()[name], tensor)
    assert loaded.scale == 0.18215


def test_vaes_that_are_none(vae, dit, tiny, tmp_path):
    dit.save_pretrained(tmp_path / "dit")
    with pytest.raises(SdaError, match="describes a DiTTransformer2DModel instead of a AutoencoderKL"):
        load_vae(tmp_path / "dit")
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(SdaError, match=r"describes a AutoencoderKL instead of a DiTTransformer2DModel"):
        load_dit(tmp_path / "vae" / WEIGHTS)
    save_file(load_file(tiny.dit), tmp_path / "vae" / WEIGHTS)
    with pytest.raises(SdaError, match=r"is not the VAE of its config\.json \(.*it looks like a DiT\)"):
        load_vae(tmp_path / "vae")


def test_without_diffusers(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SdaError, match=r'pip install "sda-fast\[vae\]"'):
        load_vae(tmp_path)
