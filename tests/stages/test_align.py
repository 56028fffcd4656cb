import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.utils import save_image

import sda_fast
from sda_fast.data import center_crop, find_images, identity, read_image, to_uint8, to_unit
from sda_fast.errors import SdaError
from sda_fast.models import load_adm
from sda_fast.projector import Projector, Purifier
from sda_fast.stages import align as stage
from sda_fast.stages.align import AlignSettings, align
from sda_fast.stages.manifest import file_sha256

IMAGE = AlignSettings(respacing="10", start=5, batch_size=4)
BATCH = replace(IMAGE, norm="batch", norm_group=3, batch_size=6)  # groups of three, three and, a/deep, one
JACOBIAN_FREE = replace(IMAGE, jacobian_free=True)
DIFFPURE = AlignSettings("diffpure", respacing="10", start=3, batch_size=4)
NAMES = ("a/1.png", "a/2.jpg", "a/deep/er/3.png", "b/4.JPEG", "b/5.png", "b/6.png", "top.png")
MODES = pytest.mark.parametrize("settings", [IMAGE, BATCH], ids=["image", "batch"])


@pytest.fixture
def images(tmp_path, write_images):
    return write_images(tmp_path / "images", NAMES, size=(20, 24))


@pytest.fixture
def whole(tmp_path, images, tiny, pictures):
    """whole(settings): all images projected in one go by one process."""

    def project(settings):
        folder = tmp_path / f"whole-{settings.norm}"
        align(images, folder, tiny.adm, settings)
        return pictures(folder)

    return project


def levels(tree):
    return {name: read_image_bytes(data).astype(int) for name, data in tree.items()}


def without_source(path):
    """The bytes of a file as it would be had nothing been said of its input."""
    data = path.read_bytes()
    digest = re.search(rb"input-sha256[\0 ]([0-9a-f]{64})", data)
    # A JPEG's segment begins with a mark and its length, a PNG's chunk with length and name, and ends in a checksum.
    before, after = (4, 0) if data.startswith(b"\xff\xd8") else (8, 4)
    return data[: digest.start() - before] + data[digest.end() + after :]


def read_image_bytes(data):
    import io

    return read_image(io.BytesIO(data))


@pytest.mark.parametrize(
    "settings", [IMAGE, BATCH, JACOBIAN_FREE, DIFFPURE], ids=["image", "batch", "jacobian-free", "diffpure"]
)
def test_files_mirror_the_input_and_hold_what_the_projector_makes(tmp_path, images, tiny, pictures, settings):
    summary = align(images, tmp_path / "out", tiny.adm, settings)
    assert summary == {"images": 7, "projected": 7, "failed": 0, "output": str(tmp_path / "out")}
    keys = [name.rpartition(".")[0] for name in NAMES]
    assert list(pictures(tmp_path / "out")) == [f"{key}.png" for key in keys]

    steps = {"respacing": "10", "start": settings.start, "batch_size": settings.batch_size}
    guidance = {name: getattr(settings, name) for name in ("norm", "norm_group", "jacobian_free")}
    adm = load_adm(tiny.adm)
    project = Purifier(adm, **steps) if settings is DIFFPURE else Projector(adm, **steps, **guidance)
    x = to_unit(np.stack([center_crop(read_image(images / name), 16) for name in NAMES]))
    seeds = [identity("align", key) for key in keys]
    expected = {}
    for part in (0, 1, 3, 4, 5, 6), (2,):  # a/deep is another condition: no norm over its image and others
        projected = to_uint8(project(x[list(part)], seeds=[seeds[i] for i in part]))
        expected |= {keys[i]: array for i, array in zip(part, projected, strict=True)}
    for key, array in expected.items():
        assert np.array_equal(read_image(tmp_path / "out" / f"{key}.png"), array)
        assert np.ptp(array) > 20  # a picture, not a constant


@MODES
def test_the_published_codes_files(tmp_path, images, tiny, settings):
    """The same images, saved as torchvision does for the published code: under the input's name, which says how.

    Beside the pixels a file holds what it was made of, in a comment that decoders leave alone.
    """
    align(images, tmp_path / "png", tiny.adm, settings)
    settings = replace(settings, format="original")
    align(images, tmp_path / "out", tiny.adm, settings)
    for name in NAMES:
        levels = torch.from_numpy(read_image((tmp_path / "png" / name).with_suffix(".png")))
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save_image(levels.permute(2, 0, 1) / 255, tmp_path / name)
        assert without_source(tmp_path / "out" / name) == (tmp_path / name).read_bytes()
    assert len(find_images(tmp_path / "out")[0]) == len(NAMES)

    torn = tmp_path / "out" / "b" / "4.JPEG"
    torn.write_bytes(torn.read_bytes()[:-1])
    assert align(images, tmp_path / "out", tiny.adm, settings)["projected"] == (3 if settings.norm == "batch" else 1)
    assert without_source(torn) == (tmp_path / "b" / "4.JPEG").read_bytes()


def test_the_three_projections_differ(tmp_path, images, tiny, pictures):
    folders = [tmp_path / name for name in ("image", "batch", "diffpure")]
    for folder, settings in zip(folders, (IMAGE, BATCH, DIFFPURE), strict=True):
        align(images, folder, tiny.adm, settings)
    assert len({pictures(folder)["a/1.png"] for folder in folders}) == 3


@pytest.mark.parametrize("subset", [NAMES[4:5], NAMES[:1], NAMES[1::2], NAMES[3:]])
def test_an_image_does_not_depend_on_its_company(tmp_path, images, tiny, pictures, whole, subset):
    for name in subset:
        (tmp_path / "some" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / name, tmp_path / "some" / name)
    align(tmp_path / "some", tmp_path / "out", tiny.adm, IMAGE)
    made = pictures(tmp_path / "out")
    assert len(made) == len(subset)
    assert made.items() <= whole(IMAGE).items()


def test_another_batch_size_moves_last_bits_only(tmp_path, images, tiny, pictures, whole):
    expected = levels(whole(IMAGE))
    for size in (1, 7):
        align(images, tmp_path / f"{size}", tiny.adm, replace(IMAGE, batch_size=size))
        for name, array in levels(pictures(tmp_path / f"{size}")).items():
            assert abs(array - expected[name]).max() <= 1


@MODES
@pytest.mark.parametrize("written", [0, 1, 3, 5, 6])
def test_an_interrupted_run_goes_on_to_the_same_files(
    tmp_path, images, tiny, pictures, whole, monkeypatch, settings, written
):
    """Interrupted before, inside and after a batch and inside a group."""
    files, lock = [], threading.Lock()

    def write(array, path, source):  # in several threads
        with lock:
            if len(files) == written:
                raise KeyboardInterrupt
            files.append(path)
        sda_fast.data.write_png(array, path, source)

    monkeypatch.setattr("sda_fast.data.writer.write_png", write)
    with pytest.raises(KeyboardInterrupt):
        align(images, tmp_path / "out", tiny.adm, settings)
    monkeypatch.undo()
    before = {path: path.stat().st_mtime_ns for path in files}
    assert len(before) == written
    summary = align(images, tmp_path / "out", tiny.adm, settings)
    assert pictures(tmp_path / "out") == whole(settings)
    assert {path: path.stat().st_mtime_ns for path in files} == before
    if settings is IMAGE:
        assert summary["projected"] == 7 - written


@MODES
def test_two_workers_make_the_same_files(tmp_path, images, tiny, pictures, whole, settings):
    align(images, tmp_path / "out", tiny.adm, settings, workers=2)
    assert pictures(tmp_path / "out") == whole(settings)


def test_a_killed_command_goes_on_to_the_same_files(tmp_path, images, tiny, pictures, whole):
    options = {"input": images, "output": tmp_path / "out", "adm": tiny.adm, "respacing": 10, "start": 5}
    arguments = [str(text) for name, value in options.items() for text in (f"--{name}", value)]
    command = [sys.executable, "-m", "sda_fast", "align", *arguments, "--batch-size", "4"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (done := pictures(tmp_path / "out")) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert done, errors
    assert align(images, tmp_path / "out", tiny.adm, IMAGE)["images"] == 7
    assert pictures(tmp_path / "out") == whole(IMAGE)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_folder_that_cannot_be_written_stops_with_what_is_done(tmp_path, images, tiny, pictures, whole, cli, workers):
    """A file stands in the way of the folder b; a full disk ends in the same place."""
    out = tmp_path / "out"
    align(images, out, tiny.adm, IMAGE)
    shutil.rmtree(out / "b")
    (out / "a" / "2.png").unlink()
    (out / "b").touch()
    options = ["--respacing", 10, "--start", 5, "--batch-size", 4, "--workers", workers]
    said = cli("align", "-i", images, "-o", out, "--adm", tiny.adm, *options)
    assert said.code == 2
    assert said.err.startswith(f"sda-fast: {out / 'b' / '4.png'} cannot be written (")
    assert " 4 of 7 images are done, 3 (b/4, b/5, b/6) are not: the same command goes on with them" in said.err
    (out / "b").unlink()
    assert align(images, out, tiny.adm, IMAGE)["projected"] == 3
    assert pictures(out) == whole(IMAGE)


def test_a_second_call_computes_nothing_and_a_torn_file_is_made_again(tmp_path, images, tiny, pictures, monkeypatch):
    align(images, tmp_path / "out", tiny.adm, IMAGE)
    expected = pictures(tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    with monkeypatch.context() as patch:
        patch.setattr(stage, "_make_work", lambda *_: pytest.fail("computed"))
        assert align(images, tmp_path / "out", tiny.adm, IMAGE)["projected"] == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    torn = tmp_path / "out" / "a" / "1.png"
    torn.write_bytes(torn.read_bytes()[:-5])
    assert align(images, tmp_path / "out", tiny.adm, IMAGE)["projected"] == 1
    assert pictures(tmp_path / "out") == expected


def test_images_that_come_later_are_added(tmp_path, images, tiny, pictures, whole):
    (images / NAMES[2]).rename(tmp_path / "later.png")
    align(images, tmp_path / "out", tiny.adm, IMAGE)
    (tmp_path / "later.png").rename(images / NAMES[2])
    assert align(images, tmp_path / "out", tiny.adm, IMAGE)["projected"] == 1
    assert pictures(tmp_path / "out") == whole(IMAGE)


@MODES
def test_the_manifest_says_what_was_done(tmp_path, images, tiny, settings):
    align(images, tmp_path / "out", tiny.adm, settings)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["stage"] == "align"
    assert manifest["version"] == sda_fast.__version__
    assert manifest["finished"]["images"] == 7
    assert manifest["settings"] == {
        "projection": "dda",
        "phase_convolutions": False,
        "winograd": False,
        "respacing": "10",
        "start": 5,
        "factor": 4,
        "scale": 6.0,
        "norm": settings.norm,
        **({"norm_groups": "by corruption"} if settings is BATCH else {}),
        "norm_group": settings.norm_group,
        "jacobian_free": False,
        "engine": "eager",
        "precision": "fp32",
        "batch_size": settings.batch_size,
        "seed": 0,
        "decoder": "pillow",
        "format": "png",
        "image_size": 16,
        "input": str(images.resolve()),
        "input_made_with": None,
        "weights": {"adm": file_sha256(tiny.adm)},
    }


@pytest.mark.parametrize(("kind", "respacing", "start"), [("dda", "100", 50), ("diffpure", "1000", 150)])
def test_published_settings_are_filled_in(kind, respacing, start):
    settings = AlignSettings(projection=kind).resolved()
    assert (settings.respacing, settings.start) == (respacing, start)
    assert AlignSettings(projection=kind, start=3).resolved().start == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": 4}, "start = 5, this run has start = 4"),
        ({"respacing": "20"}, 'respacing = "10", this run has respacing = "20"'),
        ({"factor": 2}, "factor = 4, this run has factor = 2"),
        ({"scale": 3.0}, "scale = 6.0, this run has scale = 3.0"),
        ({"norm": "batch", "norm_group": 2}, 'norm = "image", this run has norm = "batch"'),
        ({"norm_group": 4}, "norm_group = 10, this run has norm_group = 4"),
        ({"batch_size": 5}, "batch_size = 4, this run has batch_size = 5"),
        ({"seed": 1}, "seed = 0, this run has seed = 1"),
        ({"projection": "diffpure"}, 'projection = "dda", this run has projection = "diffpure"'),
        ({"format": "original"}, 'format = "png", this run has format = "original"'),
    ],
)
def test_other_settings_are_not_mixed_in(tmp_path, images, tiny, pictures, change, message):
    align(images, tmp_path / "out", tiny.adm, IMAGE)
    before = pictures(tmp_path / "out")
    with pytest.raises(SdaError, match=rf"out was made with {message}: use another --output or delete the folder"):
        align(images, tmp_path / "out", tiny.adm, replace(IMAGE, **change))
    assert pictures(tmp_path / "out") == before


def test_other_weights_and_another_input_are_not_mixed_in(tmp_path, images, tiny):
    align(images, tmp_path / "out", tiny.adm, IMAGE)
    with pytest.raises(SdaError, match=r"made with weights\.adm = "):
        align(images, tmp_path / "out", tiny.save("adm", "other", seed=1), IMAGE)
    copy = shutil.copytree(images, tmp_path / "copy")
    with pytest.raises(SdaError, match=r'made with input = ".*images", this run has input = ".*copy"'):
        align(copy, tmp_path / "out", tiny.adm, IMAGE)


def test_an_input_made_anew_with_other_settings_is_not_mixed_in(tmp_path, images, tiny):
    align(images, tmp_path / "first", tiny.adm, IMAGE)
    align(tmp_path / "first", tmp_path / "second", tiny.adm, IMAGE)
    shutil.rmtree(tmp_path / "first")
    align(images, tmp_path / "first", tiny.adm, replace(IMAGE, seed=7))
    with pytest.raises(SdaError, match=r"input_made_with\.seed = 0, this run has input_made_with\.seed = 7"):
        align(tmp_path / "first", tmp_path / "second", tiny.adm, IMAGE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": 0}, "start=0 is out of range"),
        ({"start": 10}, "start=10 is out of range"),
        ({"factor": 3}, "D=3 does not divide the image size 16"),
        ({"factor": 0}, "D=0 does not divide"),
        ({"batch_size": 0}, "batch_size=0 is out of range"),
        ({"norm_group": 0}, "norm_group=0 is out of range"),
        ({"norm": "group"}, "norm 'group' is not known"),
        ({"norm": "batch", "norm_group": 3}, "would cut a norm group of 3"),
        ({"respacing": "1001"}, "'1001': 1001 is not between 1 and 1000"),
        ({"winograd": True}, "winograd is an option of the inductor engine, not of eager: give both or"),
        (
            {"winograd": True, "engine": "inductor"},
            "winograd computes in bf16, not in fp32: choose",
        ),
        ({"projection": "diffpure", "jacobian_free": True}, "diffpure has no guidance that could be jacobian_free"),
        ({"engine": "turbo"}, "engine 'turbo' is not known; choose one of eager, inductor, onnx, trt"),
        ({"precision": "fp8"}, "precision 'fp8' is not known"),
        (
            {"engine": "onnx", "precision": "bf16"},
            "onnx engine runs fp32 on the CPU, not bf16 on cpu",
        ),
        ({"decoder": "turbo"}, "decoder 'turbo' is not known; choose from pillow, dali, dali-gpu"),
        ({"projection": "sdedit"}, "projection 'sdedit' is not known"),
        ({"format": "jpeg"}, """format 'jpeg' is not known; choose "png" or "original\""""),
    ],
)
def test_wrong_settings_are_refused_before_the_folder_is_made(tmp_path, images, tiny, change, message):
    with pytest.raises(SdaError, match=message):
        align(images, tmp_path / "out", tiny.adm, replace(IMAGE, **change))
    assert not (tmp_path / "out").exists()


def test_an_output_inside_the_input_is_refused(tmp_path, images, tiny):
    for output in (images / "out", images, images / ".." / "images" / "deep" / "er"):
        with pytest.raises(SdaError, match=r"lies in --input .*; move it"):
            align(images, output, tiny.adm, IMAGE)
    assert len(os.listdir(images)) == 3
