import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import sda_fast
from sda_fast.data import identity, read_image, to_uint8
from sda_fast.errors import SdaError
from sda_fast.models import load_dit
from sda_fast.sampler import Sampler
from sda_fast.stages.manifest import file_sha256
from sda_fast.stages.synthesize import SynthesizeSettings, synthesize

SETTINGS = SynthesizeSettings(respacing="10", clip=True, batch_size=4)


@pytest.fixture
def whole(tmp_path, tiny, pictures):
    synthesize(tmp_path / "whole", tiny.dit, 3, settings=SETTINGS)
    return pictures(tmp_path / "whole")


def pixels(data):
    return read_image(io.BytesIO(data)).astype(int)


@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, cfg_scale=1.5)], ids=["plain", "guided"])
def test_every_class_gets_its_images(tmp_path, tiny, pictures, settings):
    summary = synthesize(tmp_path / "out", tiny.dit, 3, settings=settings)
    assert summary == {"images": 9, "synthesized": 9, "output": str(tmp_path / "out")}
    keys = [f"{name}/{index:05d}" for name in tiny.classes for index in range(3)]
    assert list(pictures(tmp_path / "out")) == [f"{key}.png" for key in keys]
    sampler = Sampler(load_dit(tiny.dit), "10", settings.cfg_scale, clip=True, batch_size=4)
    images = sampler([0, 0, 0, 1, 1, 1, 2, 2, 2], seeds=[identity("synthesize", key) for key in keys])
    for key, array in zip(keys, to_uint8(images, "truncate"), strict=True):
        assert np.array_equal(read_image(tmp_path / "out" / f"{key}.png"), array)
        assert np.ptp(array) > 20


def test_guidance_clipping_seed_and_class_matter(tmp_path, tiny, pictures, whole):
    for name, change in {"cfg": {"cfg_scale": 1.5}, "clip": {"clip": False}, "seed": {"seed": 1}}.items():
        synthesize(tmp_path / name, tiny.dit, 1, settings=replace(SETTINGS, **change))
        assert pictures(tmp_path / name)["bee/00000.png"] != whole["bee/00000.png"]
    assert len(set(whole.values())) == 9


def test_more_images_and_classes_leave_the_earlier_ones(tmp_path, tiny, pictures, whole):
    counts = []
    for per_class, only in ((1, ["cow"]), (2, ["cow", "ant", "cow"]), (2, None), (3, None)):
        counts.append(synthesize(tmp_path / "out", tiny.dit, per_class, only=only, settings=SETTINGS)["synthesized"])
        assert pictures(tmp_path / "out").items() <= whole.items()
    assert counts == [1, 3, 2, 3]
    assert pictures(tmp_path / "out") == whole
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert synthesize(tmp_path / "out", tiny.dit, 2, settings=SETTINGS)["synthesized"] == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")} == times


@pytest.mark.parametrize("size", [1, 9])
def test_another_batch_size_moves_last_bits_only(tmp_path, tiny, pictures, whole, size):
    synthesize(tmp_path / "out", tiny.dit, 3, settings=replace(SETTINGS, batch_size=size))
    for name, data in pictures(tmp_path / "out").items():
        assert abs(pixels(data) - pixels(whole[name])).max() <= 1


@pytest.mark.parametrize("written", [0, 2, 4, 7])
def test_an_interrupted_run_goes_on_to_the_same_files(tmp_path, tiny, pictures, whole, monkeypatch, written):
    left = iter(range(written))

    def write(array, path, source):
        if next(left, None) is None:
            raise KeyboardInterrupt
        sda_fast.data.write_png(array, path, source)

    with monkeypatch.context() as patch:
        patch.setattr("sda_fast.data.writer.write_png", write)
        with pytest.raises(KeyboardInterrupt):
            synthesize(tmp_path / "out", tiny.dit, 3, settings=SETTINGS)
    assert len(pictures(tmp_path / "out")) == written
    assert synthesize(tmp_path / "out", tiny.dit, 3, settings=SETTINGS)["synthesized"] == 9 - written
    assert pictures(tmp_path / "out") == whole


def test_two_workers_make_the_same_files(tmp_path, tiny, pictures, whole):
    synthesize(tmp_path / "out", tiny.dit, 3, settings=SETTINGS, workers=2)
    assert pictures(tmp_path / "out") == whole


def test_the_manifest_says_what_was_done(tmp_path, tiny):
    synthesize(tmp_path / "out", tiny.dit, 1, settings=SETTINGS)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["stage"] == "synthesize"
    assert manifest["version"] == sda_fast.__version__
    assert manifest["finished"].items() >= {"per_class": 1, "images": 3}.items()
    assert manifest["settings"] == {
        "respacing": "10",
        "cfg_scale": 1.0,
        "clip": True,
        "engine": "eager",
        "precision": "fp32",
        "batch_size": 4,
        "seed": 0,
        "classes": list(tiny.classes),
        "weights": {"dit": file_sha256(tiny.dit)},
    }
    with pytest.raises(SdaError, match=r"made with cfg_scale = 1\.0, this run has cfg_scale = 2\.0"):
        synthesize(tmp_path / "out", tiny.dit, 1, settings=replace(SETTINGS, cfg_scale=2.0))
    with pytest.raises(SdaError, match=r"made with weights\.dit = "):
        synthesize(tmp_path / "out", tiny.save("dit", "other", 1, tiny.classes), 1, settings=SETTINGS)


def test_names_of_classes_are_given_where_the_weights_have_none(tmp_path, tiny, pictures):
    nameless = tiny.save("dit", "nameless")
    with pytest.raises(SdaError, match=r"nameless.safetensors does not name its classes: give them with --classes"):
        synthesize(tmp_path / "out", nameless, 1, settings=SETTINGS)
    synthesize(tmp_path / "out", nameless, 1, ["x", "y z", "ü"], settings=SETTINGS)
    assert set(pictures(tmp_path / "out")) == {"x/00000.png", "y z/00000.png", "ü/00000.png"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_class": 0}, "--per-class 0 is out of range: give at least 1"),
        ({"classes": ["x", "y"]}, r"2 class names were given, but DiT .* has 3 classes"),
        ({"classes": ["x", "y", "a/b"]}, "class 'a/b' cannot name a folder"),
        ({"classes": ["x", "y", ".."]}, r"class '\.\.' cannot name a folder"),
        ({"only": ["ant", "dog"]}, r"class 'dog' is none of the model's 3 \(ant, bee, cow"),
        ({"settings": replace(SETTINGS, cfg_scale=0.5)}, "cfg_scale=0.5 is out of range"),
        ({"settings": replace(SETTINGS, batch_size=0)}, "batch_size=0 is out of range"),
        ({"settings": replace(SETTINGS, respacing="ten")}, "'ten' is not of the form"),
        ({"preset": "dit-xxl-2"}, "unknown DiT preset 'dit-xxl-2'"),
        ({"workers": 0}, "--workers 0 is out of range"),
    ],
)
def test_wrong_options_are_refused(tmp_path, tiny, options, message):
    with pytest.raises(SdaError, match=message):
        synthesize(tmp_path / "out", tiny.dit, **{"settings": SETTINGS, "per_class": 1, **options})
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"in_channels": 4},
            r"works on latents \(4 channels\): give --vae, the autoencoder that decodes them",
        ),
        ({"class_dropout_prob": 0.0}, "has no null class"),
    ],
)
def test_models_that_do_not_fit_are_refused(tmp_path, tiny, changes, message):
    dit = tiny.save("dit", "unfit", names=tiny.classes, **changes)
    with pytest.raises(SdaError, match=message):
        synthesize(tmp_path / "out", dit, 1, settings=replace(SETTINGS, cfg_scale=1.5))
    assert not (tmp_path / "out").exists()


def test_latents_are_decoded(tmp_path, tiny, pictures):
    diffusers = pytest.importorskip("diffusers", reason='needs pip install "sda-fast[vae]"')
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, **blocks)
    vae.save_pretrained(tmp_path / "vae")
    dit = tiny.save("dit", "of_latents", names=tiny.classes, in_channels=4)
    settings = replace(SETTINGS, clip=False)
    for name, workers in (("one", 1), ("two", 2)):
        synthesize(tmp_path / name, dit, 2, settings=settings, vae=tmp_path / "vae", workers=workers)
    assert len(pictures(tmp_path / "one")) == 6
    assert pictures(tmp_path / "one") == pictures(tmp_path / "two")
    key = f"{tiny.classes[1]}/00001"
    latents = Sampler(load_dit(dit), "10", batch_size=4)([1], seeds=[identity("synthesize", key)])
    with torch.no_grad():
        image = vae.eval().decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
    difference = pixels(pictures(tmp_path / "one")[f"{key}.png"]) - to_uint8(image, "truncate")[0]
    assert abs(difference).max() <= 1
    with pytest.raises(SdaError, match=r"works on pixels \(3 channels\): leave --vae out"):
        synthesize(tmp_path / "three", tiny.dit, 1, settings=settings, vae=tmp_path / "vae")
