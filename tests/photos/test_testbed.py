import json

import numpy as np
import pytest

import sda_fast
from sda_fast.data import CORRUPTIONS, corrupt, identity, list_images, read_image
from sda_fast.data.corruptions import library_version
from sda_fast.errors import SdaError
from sda_fast.photos import testbed as stage
from sda_fast.photos.dataset import CLASSES, held_out_patches
from sda_fast.photos.testbed import SEVERITY, write_testbed

pytest.importorskip("imagecorruptions", reason='needs pip install "sda-fast[photos]"')

TWO = ("fog", "gaussian_noise")


def test_the_layout_of_imagenet_c(tmp_path, pictures):
    summary = write_testbed(tmp_path / "out", 2, TWO)
    groups = ["clean", *(f"{name}/{SEVERITY}" for name in TWO)]
    expected = [f"{group}/{name}/00{i}.png" for group in groups for name in CLASSES for i in (0, 1)]
    assert sorted(pictures(tmp_path / "out")) == sorted(expected)
    assert summary == {"images": len(expected), "output": str(tmp_path / "out")}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"] == {"severity": SEVERITY, "corruptions_library": library_version()}
    assert manifest["version"] == sda_fast.__version__
    assert manifest["finished"].items() >= {"per_class": 2, "corruptions": list(TWO)}.items()
    for name in CLASSES:
        patch = held_out_patches(name, 2)[1]
        assert np.array_equal(read_image(tmp_path / "out" / "clean" / name / "001.png"), patch)
        key = f"fog/{SEVERITY}/{name}/001"
        corrupted = corrupt(patch, "fog", SEVERITY, identity("corrupt", key))
        assert np.array_equal(read_image(tmp_path / "out" / f"{key}.png"), corrupted)
    assert {file.class_name for file in list_images(tmp_path / "out")} == set(CLASSES)


def test_all_fifteen_corruptions(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(stage, "CLASSES", CLASSES[:2])
    write_testbed(tmp_path / "out", 1)
    made = pictures(tmp_path / "out")
    assert len(made) == 2 * (1 + len(CORRUPTIONS)) == 32
    assert len(set(made.values())) == 32


def test_more_patches_and_corruptions_leave_the_earlier_files(tmp_path, pictures):
    write_testbed(tmp_path / "out", 1, TWO[:1])
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    write_testbed(tmp_path / "out", 2, TWO)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    write_testbed(tmp_path / "whole", 2, TWO)
    assert pictures(tmp_path / "out") == pictures(tmp_path / "whole")


def test_patches_of_other_options_are_refused_where_no_others_may_be(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(stage, "CLASSES", CLASSES[:2])
    out = tmp_path / "out"
    write_testbed(out, 1, TWO[:1], exactly=True)
    write_testbed(out, 2, TWO, exactly=True)  # what is there is a part of it
    written = pictures(out)
    for options in ((1, TWO), (2, TWO[1:]), (3, TWO[:1])):
        with pytest.raises(SdaError, match=r"out holds \d images? that these settings do not ask for, such as \w+/"):
            write_testbed(out, *options, exactly=True)
    assert pictures(out) == written
    write_testbed(out, 1, TWO)


def test_an_interrupted_run_goes_on_to_the_same_files(tmp_path, pictures, monkeypatch):
    left = iter(range(20))

    def write(array, path):
        if next(left, None) is None:
            raise KeyboardInterrupt
        sda_fast.data.write_png(array, path)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "write_png", write)
        with pytest.raises(KeyboardInterrupt):
            write_testbed(tmp_path / "out", 1, TWO)
    assert len(pictures(tmp_path / "out")) == 20
    write_testbed(tmp_path / "out", 1, TWO)
    write_testbed(tmp_path / "whole", 1, TWO)
    assert pictures(tmp_path / "out") == pictures(tmp_path / "whole")


def test_another_severity_is_not_mixed_in(tmp_path):
    write_testbed(tmp_path / "out", 1, ("contrast",), 1)
    with pytest.raises(SdaError, match="made with severity = 1, this run has severity = 2"):
        write_testbed(tmp_path / "out", 1, ("contrast",), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((1, ("rain",)), "corruption 'rain' is not known; choose from gaussian_noise, "),
        ((1, ("fog",), 0), "--severity 0 is out of range"),
        ((101, ("fog",)), "--per-class 101 is out of range: each photograph has 100"),
    ],
)
def test_wrong_options_make_no_folder(tmp_path, options, message):
    with pytest.raises(SdaError, match=message):
        write_testbed(tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()
