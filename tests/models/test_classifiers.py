"""Classifiers from timm behind images in [-1, 1], and the files they are kept in."""

import pytest
import torch

from sda_fast.errors import SdaError
from sda_fast.models import create_classifier, load_classifier, save_checkpoint

CLASSES = ("ant", "bee", "cow", "dog")
NARROW = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "patch_size": 1}


@pytest.mark.parametrize("kind", ["resnet", "convnext"])
def test_a_file_gives_the_classifier_back(tiny, kind):
    path = tiny.save(kind, f"again_{kind}", seed=3, resize=18)
    torch.manual_seed(3)
    classifier = load_classifier(path)
    assert classifier.classes == tiny.classes
    assert (classifier.input_size, classifier.resize) == (16, 18)
    assert not classifier.training
    assert not any(p.requires_grad for p in classifier.parameters())
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(classifier(x), load_classifier(path)(x))
    assert classifier(x).shape == (2, len(tiny.classes))
    # A second classifier of the same description, with these weights, is the same function.
    twin = create_classifier(**classifier.config).eval()
    twin.load_state_dict(classifier.state_dict())
    assert torch.equal(twin(x), classifier(x))


def test_the_model_sees_images_normalised_as_it_was_trained():
    classifier = create_classifier("convnext_atto", CLASSES, NARROW, input_size=16)
    seen = []
    classifier.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    assert classifier(x).shape == (1, 4)
    mean, std = (torch.tensor(classifier.model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    torch.testing.assert_close(seen[0], ((x + 1) / 2 - mean) / std)
    assert not {"mean", "std"} & classifier.state_dict().keys()  # the file holds the timm model's weights alone


def test_the_normalisation_is_part_of_the_description(tmp_path):
    halves = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.25, 1.0]}
    classifier = create_classifier("convnext_atto", CLASSES, NARROW, input_size=16, **halves)
    assert classifier.config.items() >= halves.items()
    path = save_checkpoint(tmp_path / "m.safetensors", classifier, {"kind": "classifier", "config": classifier.config})
    again = load_classifier(path)
    assert torch.equal(again.mean.flatten(), torch.tensor(halves["mean"]))
    assert torch.equal(again.std.flatten(), torch.tensor(halves["std"]))
    usual = create_classifier("convnext_atto", CLASSES, NARROW, input_size=16)
    assert usual.config["mean"] == list(usual.model.pretrained_cfg["mean"])
    old = {name: value for name, value in usual.config.items() if name not in halves}  # of an earlier version
    assert create_classifier(**old).config == usual.config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"mean": [128, 128, 128]},
            r"mean \[128.0, 128.0, 128.0\] is out of range: give one number in \[0, 1\] for each",
        ),
        ({"mean": [0.5]}, r"mean \[0.5\] is out of range"),
        ({"std": [0, 0.5, 0.5]}, r"std \[0.0, 0.5, 0.5\] is out of range: give one number above 0, up to 1, for each"),
    ],
)
def test_a_normalisation_out_of_range(given, message):
    with pytest.raises(SdaError, match=message):
        create_classifier("convnext_atto", CLASSES, NARROW, input_size=16, **given)


def test_an_unknown_name_is_refused_with_close_ones():
    with pytest.raises(SdaError, match=r"no model named 'resnet18x'.*resnet18"):
        create_classifier("resnet18x", CLASSES)
    with pytest.raises(SdaError, match="no model named 'qqq'; close names: none"):
        create_classifier("qqq", CLASSES)


@pytest.mark.parametrize("architecture", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_unknown_options_are_refused(architecture):
    with pytest.raises(SdaError, match=rf"{architecture} does not take these options: .*wings"):
        create_classifier(architecture, CLASSES, {"wings": 2})
