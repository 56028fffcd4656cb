"""Diffusion-TTA against the original's numbers; batching, resetting, and models that do not go together."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sda_fast.errors import SdaError
from sda_fast.methods import create
from sda_fast.methods.diffusion_tta import matching_classes
from sda_fast.models import VAE, DiT, load_classifier, load_dit

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def reference(load_reference, reference_network):
    tensors, config = load_reference("diffusion_tta")

    def state(prefix):
        return {key.removeprefix(prefix): value.clone() for key, value in tensors.items() if key.startswith(prefix)}

    dit = DiT(**config["dit"])
    dit.load_state_dict(state("dit/"))
    return reference_network(state("classifier/")), dit.eval(), tensors


class Latent(nn.Module):
    """An autoencoder of four channels and an eighth of the side, with a config like diffusers'."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(scaling_factor=0.18215, block_out_channels=[1, 1])
        self.project = nn.Conv2d(3, 4, 2, stride=2)

    def encode(self, x):
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=self.project(x)))


@pytest.fixture
def pixels(tiny):
    """A classifier and a DiT of pixels, both with named classes."""
    return load_classifier(tiny.resnet), load_dit(tiny.dit)


def short(model, dit, **options):
    return create("diffusion_tta", model, dit=dit, **{"updates": 2, "pairs": 6, "batch_size": 4, **options})


FAST = partial(torch.optim.Adam, lr=1e-3)  # far enough for predictions to tell


@pytest.mark.parametrize("batch_size", [12, 5, 1])
def test_loss_and_gradients_match_the_original(reference, relative, batch_size):
    network, dit, tensors = reference
    tta = create("diffusion_tta", network, dit=dit, vae=VAE(Latent()), batch_size=batch_size)
    with torch.no_grad():
        assert relative(tta.adapted(tensors["image"]), tensors["logits"]) <= 1e-5
    loss = tta.accumulate(tensors["image"], tensors["latent"], tensors["timesteps"], tensors["noise"])
    assert relative(loss, tensors["loss"]) <= 1e-5
    for name, parameter in tta.adapted.named_parameters():
        assert relative(parameter.grad, tensors[f"grad_classifier/{name}"]) <= 1e-5, name
    weight = tta.adapted_dit.blocks[0].attn.qkv.weight
    assert relative(weight.grad, tensors["grad_dit_blocks.0.attn.qkv.weight"]) <= 1e-5


def test_the_frozen_variant_has_the_same_gradients_for_the_classifier(reference, relative):
    network, dit, tensors = reference
    tta = create("diffusion_tta", network, dit=dit, vae=VAE(Latent()), adapt_diffusion=False)
    tta.accumulate(tensors["image"], tensors["latent"], tensors["timesteps"], tensors["noise"])
    for name, parameter in tta.adapted.named_parameters():
        assert relative(parameter.grad, tensors[f"grad_classifier/{name}"]) <= 1e-5, name
    assert all(parameter.grad is None for parameter in dit.parameters())


def test_a_result_depends_on_the_image_and_its_identity_alone(pixels):
    tta = short(*pixels, optimizer=FAST)
    together = tta(IMAGES, seeds=[5, 6])
    assert torch.equal(tta(IMAGES[[1]], seeds=[6]), together[[1]])
    assert torch.equal(tta(IMAGES.flip(0), seeds=[6, 5]), together.flip(0))
    assert not torch.equal(tta(IMAGES[[1]], seeds=[7]), together[[1]])
    assert tta.per_image
    source = pixels[0](IMAGES).softmax(1)
    assert not torch.allclose(source, together, atol=1e-6), "something was adapted"


def test_the_batch_size_shows_in_last_bits_only(pixels):
    results = [short(*pixels, optimizer=FAST, batch_size=size)(IMAGES) for size in (6, 4, 1)]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-5, rtol=0)


def test_both_networks_are_adapted_but_not_the_embeddings_and_not_the_originals(pixels):
    model, dit = pixels
    before = {name: value.clone() for module in pixels for name, value in module.state_dict().items()}
    tta = short(model, dit, online=True, optimizer=FAST)
    tta(IMAGES)
    for module in pixels:
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    for source, adapted in ((model, tta.adapted), (dit, tta.adapted_dit)):
        new = dict(adapted.named_parameters())
        same = {name for name, value in source.named_parameters() if torch.equal(value, new[name])}
        assert same == ({"pos_embed", "y_embedder.embedding_table.weight"} if source is dit else set())


def test_online_keeps_weights_and_optimizer_until_reset(pixels):
    single, online = short(*pixels, optimizer=FAST), short(*pixels, optimizer=FAST, online=True)
    alone, stream = single(IMAGES), online(IMAGES)
    assert torch.equal(alone[0], stream[0])
    assert not torch.equal(alone[1], stream[1])
    assert not online.per_image
    online.reset()
    assert torch.equal(online(IMAGES), stream)


def test_the_published_optimizers(pixels, tiny):
    sgd, adamw = short(*pixels).optimizer, short(load_classifier(tiny.convnext), pixels[1]).optimizer
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.defaults.items() >= {"lr": 5e-3, "momentum": 0.9}.items()
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults.items() >= {"lr": 1e-5, "weight_decay": 0.0}.items()


def test_latents_are_scaled_means_of_the_resized_image(reference):
    network, dit, _ = reference
    vae = VAE(Latent())
    tta = create("diffusion_tta", network, dit=dit, vae=vae, updates=1, pairs=2)
    latents = tta.diffused(IMAGES)
    torch.testing.assert_close(latents, vae.autoencoder.project(IMAGES).detach() * 0.18215)
    assert tta.diffused(torch.rand(1, 3, 20, 20)).shape == (1, 4, 8, 8)
    assert tta(IMAGES).shape == (2, 10)


def test_classes_go_by_name(pixels):
    model, dit = pixels
    dit.classes = ("cow", "ant", "bee")
    assert matching_classes(model, dit) == [1, 2, 0]
    torch.testing.assert_close(short(model, dit).class_embeddings, dit.y_embedder.embedding_table.weight[[1, 2, 0]])
    assert matching_classes(nn.Flatten(), dit) == [0, 1, 2]
    dit.classes = ("cow", "ant", "elk")
    with pytest.raises(SdaError, match="the DiT does not know the classifier's class 'bee'"):
        matching_classes(model, dit)


def test_wrong_use(pixels, reference):
    model, dit = pixels
    with pytest.raises(SdaError, match="updates=0, pairs=180, batch_size=20 are out of range"):
        create("diffusion_tta", model, dit=dit, updates=0)
    with pytest.raises(SdaError, match="the DiT works on latents of 4 channels: give its VAE"):
        create("diffusion_tta", model, dit=reference[1])
    with pytest.raises(SdaError, match="the classifier tells 3 classes apart, the DiT 10: give one with the same"):
        create("diffusion_tta", model, dit=reference[1], vae=VAE(Latent()))
    with pytest.raises(SdaError, match="the classifier tells 10 classes apart, the DiT 3"):
        short(reference[0], dit, optimizer=partial(torch.optim.SGD, lr=1.0))(IMAGES)
