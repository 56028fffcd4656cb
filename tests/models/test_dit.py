"""DiT against facebookresearch/DiT's numbers."""

import pytest
import torch

from sda_fast.models import DiT
from sda_fast.models.checkpoints import DIT_PRESETS

# Peebles & Xie 2023, table 4: the patch size hardly matters.
MILLIONS = {"s": 33, "b": 130.5, "l": 458, "xl": 675}


@pytest.fixture(scope="module")
def original(load_reference, load_weights):
    """(model, tensors, configuration) of the two-block DiT."""
    tensors, meta = load_reference("dit_tiny")
    dit = DiT(**meta["config"]).eval()
    dit.load_state_dict(load_weights(tensors))
    return dit.requires_grad_(False), tensors, meta


def relative(value, expected):
    return float((value - expected).norm() / expected.norm())


def test_output_matches_the_original(original):
    dit, tensors, _ = original
    assert relative(dit(tensors["x"], tensors["timesteps"], tensors["y"]), tensors["output"]) <= 1e-4


def test_guided_output_matches_the_original(original):
    dit, tensors, meta = original
    null = torch.full_like(tensors["y"], meta["config"]["num_classes"])
    x, timesteps = (torch.cat([tensors[name]] * 2) for name in ("x", "timesteps"))
    output = dit.forward_with_cfg(x, timesteps, torch.cat([tensors["y"], null]), meta["cfg_scale"])
    assert relative(output, tensors["cfg_output"]) <= 1e-4


def test_guidance_reads_the_first_half_and_acts_on_three_channels(original):
    dit, tensors, _ = original
    x, timesteps = torch.cat([tensors["x"], torch.full_like(tensors["x"], torch.nan)]), tensors["timesteps"].repeat(2)
    y = torch.cat([tensors["y"], torch.full_like(tensors["y"], 10)])
    first, second = dit.forward_with_cfg(x, timesteps, y, 3.0).chunk(2)
    plain = dit(tensors["x"], tensors["timesteps"], tensors["y"])
    assert torch.equal(first[:, :3], second[:, :3])
    assert relative(first[:, 3:], plain[:, 3:]) <= 1e-5
    assert relative(first[:, :3], plain[:, :3]) > 1e-2


def test_positions_are_those_in_the_file(original, load_reference):
    _, tensors, meta = original
    fresh = DiT(**meta["config"]).pos_embed
    assert torch.equal(fresh.half(), tensors["weights/pos_embed"].half())
    assert not fresh.requires_grad


@pytest.mark.parametrize("preset", DIT_PRESETS)
def test_presets_have_the_published_size(preset):
    with torch.device("meta"):
        dit = DiT(**DIT_PRESETS[preset])
    parameters = sum(p.numel() for p in dit.parameters() if p.requires_grad)
    assert parameters / 1e6 == pytest.approx(MILLIONS[preset.split("-")[1]], abs=1)


def test_a_fresh_model_returns_zeros():
    dit = DiT(input_size=8, hidden_size=32, depth=1, num_heads=2, num_classes=3)
    assert not dit(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 3])).any()


def test_labels_are_dropped_in_training_only():
    dit = DiT(input_size=8, hidden_size=32, depth=1, num_heads=2, num_classes=3, class_dropout_prob=1.0)
    labels, null = torch.tensor([0, 1, 2]), torch.full((3,), 3)
    table = dit.y_embedder.embedding_table
    assert torch.equal(dit.train().y_embedder(labels), table(null))
    assert torch.equal(dit.eval().y_embedder(labels), table(labels))


def test_without_dropout_there_is_no_null_class():
    assert (
        DiT(hidden_size=32, depth=1, num_heads=2, class_dropout_prob=0.0).y_embedder.embedding_table.num_embeddings
        == 1000
    )
