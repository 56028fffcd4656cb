"""Weights in and out, and every file that must be refused with a sentence naming it."""

import argparse
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sda_fast.errors import SdaError
from sda_fast.models import checkpoints, load_adm, load_classifier, load_dit, save_checkpoint

LOADERS = {"adm": load_adm, "dit": load_dit, "resnet": load_classifier}


@pytest.fixture
def presets(tiny, monkeypatch):
    """The tiny models' configurations as the preset "tiny" of either kind, and a wider ADM as "wide"."""
    adm, dit = load_adm(tiny.adm).config, load_dit(tiny.dit).config
    monkeypatch.setitem(checkpoints.ADM_PRESETS, "tiny", adm)
    monkeypatch.setitem(checkpoints.ADM_PRESETS, "wide", {**adm, "model_channels": 64})
    monkeypatch.setitem(checkpoints.DIT_PRESETS, "tiny", dit)


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", LOADERS)
def test_files_of_this_package_know_what_they_hold(tiny, kind):
    path = getattr(tiny, kind)
    model = LOADERS[kind](path)
    assert not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, load_file(path)[name])
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())
    assert kind == "adm" or model.classes == tiny.classes


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "ema"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt"])
def test_pickled_state_dicts_need_a_preset(tiny, presets, tmp_path, suffix, wrapper):
    adm, path = load_adm(tiny.adm), tmp_path / f"adm{suffix}"
    state = adm.state_dict()
    torch.save({wrapper: state, "step": 7} if wrapper else state, path)
    assert same(load_adm(path, "tiny"), adm)
    with pytest.raises(SdaError, match=r"does not say how its ADM is built \(it looks like an ADM\): name a preset"):
        load_adm(path)


def test_foreign_safetensors_need_a_preset(tiny, presets, tmp_path):
    save_file(load_file(tiny.dit), tmp_path / "dit.safetensors")
    assert same(load_dit(tmp_path / "dit.safetensors", "tiny"), load_dit(tiny.dit))


def test_half_precision_is_stored_and_float32_comes_back(tiny, tmp_path):
    resnet = load_classifier(tiny.resnet)  # its BatchNorms count in integers, which stay
    metadata = {"kind": "classifier", "config": resnet.config}
    path = save_checkpoint(tmp_path / "new" / "half.safetensors", resnet, metadata, torch.float16)
    assert {t.dtype for t in load_file(path).values()} == {torch.float16, torch.int64}
    for name, tensor in load_classifier(path).state_dict().items():
        expected = resnet.state_dict()[name]
        assert torch.equal(tensor, expected.half().float() if expected.is_floating_point() else expected)
    assert [file.name for file in path.parent.iterdir()] == ["half.safetensors"]


@pytest.mark.parametrize("kind", LOADERS)
def test_missing_files(tmp_path, kind):
    with pytest.raises(SdaError, match=r"nowhere\.pt does not exist"):
        LOADERS[kind](tmp_path / "nowhere.pt")
    with pytest.raises(SdaError, match=r"does not exist|holds no diffusion_pytorch_model"):
        LOADERS[kind](tmp_path)


def test_other_suffixes(tmp_path):
    path = tmp_path / "weights.onnx"
    path.touch()
    with pytest.raises(SdaError, match=r"weights\.onnx has suffix '\.onnx'; known are \.safetensors, \.pt"):
        load_adm(path)


@pytest.mark.parametrize("damage", ["truncated", "cut short", "empty", "hollow", "text"])
@pytest.mark.parametrize("form", [".safetensors", ".pt", "old .pt"])
def test_damaged_files(tiny, presets, tmp_path, form, damage):
    path = tmp_path / f"damaged.{form.split('.')[1]}"
    if form == ".safetensors":
        content = tiny.adm.read_bytes()
    else:
        torch.save(load_file(tiny.adm), path, _use_new_zipfile_serialization=form == ".pt")
        content = path.read_bytes()
    cut = {
        "truncated": content[: len(content) // 2],
        "cut short": content[:-1],
        "empty": b"",
        "hollow": b"\x80\x02.",
        "text": b"<html>gone\n",
    }
    path.write_bytes(cut[damage])
    with pytest.raises(SdaError, match=r"damaged\.\w+ is damaged"):
        load_adm(path, "tiny")


class Trap:
    """What an attacker would pickle: unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))]
)
def test_pickles_run_no_code(presets, tmp_path, save):
    path, proof = tmp_path / "trap.pt", tmp_path / "ran"
    save({"state_dict": {"input_blocks.0.0.weight": torch.ones(1)}, "trap": Trap(proof)}, path)
    with pytest.raises(SdaError, match=r"trap\.pt is damaged or holds more than tensors"):
        load_adm(path, "tiny")
    assert not proof.exists()


@pytest.mark.parametrize("content", [torch.ones(3), {"step": 7}, {"state_dict": {"a": [1]}}])
def test_pickles_without_a_state_dict(presets, tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(SdaError, match=r"other\.pt holds no state dict"):
        load_adm(tmp_path / "other.pt", "tiny")


@pytest.mark.parametrize(
    ("load", "given", "looks"),
    [
        (load_adm, "dit", "a DiT"),
        (load_adm, "resnet", "a classifier"),
        (load_dit, "adm", "an ADM"),
        (load_classifier, "adm", "an ADM"),
        (load_classifier, "dit", "a DiT"),
    ],
)
def test_another_kind_of_model(tiny, presets, load, given, looks):
    path = getattr(tiny, given)
    with pytest.raises(SdaError, match=rf"{path.name} does not say .*it looks like {looks}"):
        load(path)
    if load is not load_classifier:
        with pytest.raises(SdaError, match=rf"{path.name} is not this .*it looks like {looks}.*another preset"):
            load(path, "tiny")


def test_the_wrong_preset(tiny, presets):
    with pytest.raises(SdaError, match=r"adm\.safetensors is not this ADM \(.* has shape .* instead of .*preset"):
        load_adm(tiny.adm, "wide")
    with pytest.raises(SdaError, match="unknown ADM preset 'imagenet255'; known are imagenet64_cond"):
        load_adm(tiny.adm, "imagenet255")
    with pytest.raises(SdaError, match="unknown DiT preset 'dit-xl-3'; known are dit-s-2"):
        load_dit(tiny.dit, "dit-xl-3")


def test_a_model_of_another_schedule(tiny, presets, monkeypatch):
    monkeypatch.setitem(checkpoints.ADM_SCHEDULES, "tiny", "cosine")
    with pytest.raises(SdaError, match="preset tiny was trained on the cosine schedule, not the linear one"):
        load_adm(tiny.adm, "tiny")
    assert same(load_adm(tiny.adm, "tiny", schedule="cosine"), load_adm(tiny.adm))
    with pytest.raises(SdaError, match="preset imagenet64_cond was trained on the cosine schedule"):
        load_adm(tiny.adm, "imagenet64_cond")


def test_the_preset_that_fits_is_named(tiny, presets, tmp_path):
    for kind, load in ("adm", load_adm), ("dit", load_dit):
        torch.save(load_file(getattr(tiny, kind)), tmp_path / "unnamed.pt")
        with pytest.raises(SdaError, match="name a preset, tiny fits"):
            load(tmp_path / "unnamed.pt")
    with pytest.raises(SdaError, match=r"name a preset, one of dit-s-2, .*dit-xl-2-512"):
        load_dit(tiny.adm)


def test_averaged_weights_come_first(tiny, presets, tmp_path):
    dit = load_dit(tiny.dit)
    plain = {name: torch.zeros_like(t) for name, t in dit.state_dict().items()}
    torch.save({"model": plain, "ema": dit.state_dict(), "args": argparse.Namespace(epochs=3)}, tmp_path / "train.pt")
    assert same(load_dit(tmp_path / "train.pt", "tiny"), dit)


@pytest.mark.parametrize("older", [False, True])
def test_numpys_values_beside_the_weights(tmp_path, older):
    """By the name they have in this numpy, and by that of numpy 1, under which most published files were written."""
    meta = {"accuracy": np.float64(76.55), "curve": np.arange(3.0), "seed": np.int64(0)}
    path = tmp_path / "mm.pth"
    torch.save({"state_dict": {"a": torch.ones(2)}, "meta": meta}, path, _use_new_zipfile_serialization=False)
    assert b"numpy._core.multiarray" in path.read_bytes()
    if older:
        path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    state, _ = checkpoints.read_checkpoint(path)
    assert state.keys() == {"a"}


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("down_blocks.0.resnets.0.conv1.weight", "a diffusers UNet"),
        ("decoder.conv_in.weight", "a diffusers VAE"),
        ("input_blocks.0.0.weight", "a noise-aware classifier of guided-diffusion"),
        ("backbone.stages.0.blocks.0.attn.w_msa.qkv.weight", "an mmpretrain Swin"),
        ("backbone.stages.0.0.depthwise_conv.weight", "an mmpretrain ConvNeXt"),
        ("backbone.layers.0.attn.qkv.weight", "another mmpretrain model"),
        ("layers.0.blocks.0.attn.qkv.weight", "a Swin"),
        ("stages.0.blocks.0.conv_dw.weight", "a ConvNeXt"),
        ("text_model.embeddings.weight", "nothing known here"),
    ],
)
def test_what_a_file_looks_like(tmp_path, key, kind):
    torch.save({key: torch.ones(1, 1)}, tmp_path / "other.pth")
    for load in LOADERS.values():
        with pytest.raises(SdaError, match=rf"other\.pth does not say .*it looks like {kind}\)"):
            load(tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda state: state.pop("out.2.bias"), r"out\.2\.bias is missing; 1 missing, 0 foreign"),
        (lambda state: state.update(extra=torch.ones(1)), "extra is not one of its keys; 0 missing, 1 foreign"),
        (lambda state: state.update({"out.2.bias": torch.ones(7)}), r"out\.2\.bias has shape \[7\] instead of \[6\]"),
    ],
)
def test_keys_and_shapes_that_do_not_fit(tiny, presets, tmp_path, change, problem):
    state = load_file(tiny.adm)
    change(state)
    torch.save(state, tmp_path / "changed.pt")
    with pytest.raises(SdaError, match=rf"changed\.pt is not this ADM \({problem}"):
        load_adm(tmp_path / "changed.pt", "tiny")


def test_a_description_that_cannot_be_built(tiny, tmp_path):
    path = save_checkpoint(tmp_path / "new.safetensors", load_adm(tiny.adm), {"kind": "adm", "config": {"wings": 2}})
    with pytest.raises(SdaError, match=r"new\.safetensors describes a model .*cannot build .*wings"):
        load_adm(path)


@pytest.mark.parametrize("metadata", [["adm"], {"kind": "adm", "config": [16]}])
def test_metadata_of_another_form(tiny, tmp_path, metadata):
    path = tmp_path / "odd.safetensors"
    save_file(load_adm(tiny.adm).state_dict(), path, metadata={"sda_fast": json.dumps(metadata)})
    with pytest.raises(SdaError, match="metadata of another form"):
        load_adm(path)


@pytest.mark.parametrize("config", [{}, {"image_size": 16, "channel_mult": []}])
def test_configurations_that_build_nothing(tiny, tmp_path, config):
    path = save_checkpoint(tmp_path / "odd.safetensors", load_adm(tiny.adm), {"kind": "adm", "config": config})
    with pytest.raises(SdaError, match="cannot build"):
        load_adm(path)
    path = save_checkpoint(tmp_path / "odd2.safetensors", load_adm(tiny.adm), {"kind": "classifier", "config": config})
    with pytest.raises(SdaError, match="cannot build"):
        load_classifier(path)
