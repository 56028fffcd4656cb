import sys

import numpy as np
import pytest
import torch

from sda_fast.errors import SdaError
from sda_fast.models import create_classifier
from sda_fast.report.grad_cam import class_activation, overlay, stages

pytest.importorskip("pytorch_grad_cam", reason="Grad-CAM needs the extra report")

SWIN = {"img_size": 64, "embed_dim": 16, "depths": (1, 1, 1), "num_heads": (2, 2, 2), "window_size": 4}
FAMILIES = {
    # family: architecture, options, the last stage with 4x4 positions at 64 pixels
    "resnet": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}, "layer3"),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, "norm"),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}, "stages.2"),
}


def build(family, size=64):
    architecture, options, _ = FAMILIES[family]
    torch.manual_seed(0)
    return create_classifier(architecture, "abc", options, input_size=size).eval().requires_grad_(False)


def images(count=3, size=64):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def by_the_paper(classifier, x, layer):
    """ReLU of the maps weighted by their mean gradients (equations 1 and 2), scaled to [0, 1], enlarged."""
    kept = []
    handle = classifier.model.get_submodule(layer).register_forward_hook(lambda m, i, output: kept.append(output))
    logits = classifier(x.clone().requires_grad_(True))
    handle.remove()
    (maps,) = kept
    (gradients,) = torch.autograd.grad(logits.max(dim=1).values.sum(), maps)
    if layer == "norm":
        maps, gradients = maps.permute(0, 3, 1, 2), gradients.permute(0, 3, 1, 2)
    heat = (gradients.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1).relu()
    heat = heat - heat.amin(dim=(1, 2), keepdim=True)
    heat = heat / heat.amax(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    large = torch.nn.functional.interpolate(heat[:, None], x.shape[2:], mode="bilinear")[:, 0]
    large = large - large.amin(dim=(1, 2), keepdim=True)
    return (large / large.amax(dim=(1, 2), keepdim=True).clamp(min=1e-7)).detach().numpy(), logits.argmax(1).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_heat_is_that_of_the_paper(family):
    classifier, x, layer = build(family), images(), FAMILIES[family][2]
    found = class_activation(classifier, x)
    heat, predicted = by_the_paper(classifier, x, layer)
    assert (found.layer, found.predicted) == (layer, predicted)
    assert found.heat.shape == (3, 64, 64)
    assert found.heat.dtype == np.float32
    assert heat.std() > 0.1  # something to tell apart
    np.testing.assert_allclose(found.heat, heat, atol=1e-3)  # the package enlarges with OpenCV


@pytest.mark.parametrize("family", FAMILIES)
def test_the_classifier_is_left_as_it_was(family):
    classifier, x = build(family), images(1)
    before = classifier(x)
    class_activation(classifier, x)
    assert torch.equal(classifier(x), before)
    assert not x.requires_grad
    for module in classifier.modules():
        assert not module._forward_hooks
    assert all(p.grad is None and not p.requires_grad for p in classifier.parameters())


@pytest.mark.parametrize(("size", "layer"), [(128, "layer4"), (64, "layer3"), (32, "layer2"), (16, "layer1")])
def test_the_last_stage_with_positions_to_tell_apart(size, layer):
    assert class_activation(build("resnet", size), images(1, size)).layer == layer


def test_images_too_small_for_any_stage():
    with pytest.raises(SdaError, match="no stage with 4x4 positions for images of 8x8"):
        class_activation(build("resnet", 8), images(1, 8))


@pytest.mark.parametrize(
    ("architecture", "first", "last"),
    [
        ("resnet50", "layer1", "layer4"),
        ("resnext50_32x4d", "layer1", "layer4"),
        ("swin_base_patch4_window7_224", "layers.0", "norm"),
        ("swinv2_tiny_window8_256", "layers.0", "norm"),
        ("convnext_base", "stages.0", "stages.3"),
        ("convnextv2_tiny", "stages.0", "stages.3"),
    ],
)
def test_stages_of_published_architectures(architecture, first, last):
    import timm

    with torch.device("meta"):
        found = stages(timm.create_model(architecture))
    assert len(found) == 4
    assert (found[0][0], found[-1][0]) == (first, last)


def test_another_family():
    classifier = create_classifier("vit_tiny_patch16_224", "abc", {"img_size": 32, "depth": 1}, input_size=32)
    with pytest.raises(SdaError, match="no rule for the layer of a VisionTransformer: use a ResNet, Swin or ConvNeXt"):
        class_activation(classifier, images(1, 32))


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(SdaError, match=r'Grad-CAM panels need grad-cam: pip install "sda-fast\[report\]"'):
        class_activation(build("resnet"), images(1))


def test_overlay_is_red_where_it_is_hot():
    heat = np.zeros((8, 8), np.float32)
    heat[:, 4:] = 1
    shown = overlay(np.full((8, 8, 3), 128, np.uint8), heat)
    assert shown.shape == (8, 8, 3)
    assert shown.dtype == np.uint8
    red, _, blue = shown[0, 7].astype(int)
    assert red > blue + 50
    red, _, blue = shown[0, 0].astype(int)
    assert blue > red + 50
