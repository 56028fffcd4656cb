import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from sda_fast.data import center_crop, corrupt, identity, read_image, watermark
from sda_fast.errors import SdaError
from sda_fast.stages.corrupt import CorruptSettings, corrupt_folder
from sda_fast.stages.failures import read_failures

pytest.importorskip("imagecorruptions", reason='needs pip install "sda-fast[photos]"')

FONT = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
SMALL = CorruptSettings(size=32, resize=36)
NAMES = ("ant/1.png", "ant/2.jpg", "bee/1.JPEG")


@pytest.fixture
def images(tmp_path, write_images):
    return write_images(tmp_path / "images", NAMES, size=(50, 40))


def test_folders_are_laid_out_like_imagenet_c(tmp_path, images, pictures):
    summary = corrupt_folder(images, tmp_path / "out", ["fog", "gaussian_noise"], [2, 5], SMALL)
    assert summary == {"images": 12, "failed": 0, "output": str(tmp_path / "out")}
    expected = [
        f"{name}/{severity}/{key}.png"
        for name in ("fog", "gaussian_noise")
        for severity in (2, 5)
        for key in ("ant/1", "ant/2", "bee/1")
    ]
    made = pictures(tmp_path / "out")
    assert list(made) == expected

    # the crop of an evaluation, then the corruption with the image's own seed, then JPEG
    array = np.array(Image.open(images / "ant/1.png").resize((45, 36), Image.Resampling.BICUBIC))[2:34, 6:38]
    array = corrupt(array, "gaussian_noise", 5, identity("corrupt 0", "gaussian_noise/5/ant/1"))
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=85)
    np.testing.assert_array_equal(
        read_image(tmp_path / "out/gaussian_noise/5/ant/1.png"), np.array(Image.open(buffer).convert("RGB"))
    )
    assert len(set(made.values())) == 12


def test_the_manifest_says_that_these_are_not_the_official_files(tmp_path, images):
    corrupt_folder(images, tmp_path / "out", ["fog"], [1], SMALL)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert "not the official files of ImageNet-C or ImageNet-W" in manifest["settings"]["note"]
    assert manifest["settings"].items() >= {"size": 32, "resize": 36, "jpeg_quality": 85, "seed": 0}.items()
    assert manifest["finished"]["library"].startswith("imagecorruptions-imaug ")
    with pytest.raises(SdaError, match="made with seed = 0, this run has seed = 1"):
        corrupt_folder(images, tmp_path / "out", ["fog"], [1], replace(SMALL, seed=1))


def test_more_can_be_added_and_what_is_there_stays(tmp_path, images, pictures):
    corrupt_folder(images, tmp_path / "whole", ["fog", "snow"], [1, 2], SMALL)
    corrupt_folder(images, tmp_path / "out", ["snow"], [2], SMALL)
    torn = tmp_path / "out" / "snow/2/ant/1.png"
    torn.write_bytes(torn.read_bytes()[:-5])
    kept = tmp_path / "out" / "snow/2/bee/1.png"
    time = kept.stat().st_mtime_ns
    corrupt_folder(images, tmp_path / "out", ["fog", "snow"], [2, 1], SMALL, workers=1)
    assert pictures(tmp_path / "out") == pictures(tmp_path / "whole")
    assert kept.stat().st_mtime_ns == time


def test_the_seed_matters_and_company_does_not(tmp_path, images, pictures):
    corrupt_folder(images, tmp_path / "whole", ["gaussian_noise"], [3], SMALL)
    corrupt_folder(images, tmp_path / "other", ["gaussian_noise"], [3], replace(SMALL, seed=1))
    alone = tmp_path / "alone" / "bee" / "1.JPEG"
    alone.parent.mkdir(parents=True)
    shutil.copy(images / "bee" / "1.JPEG", alone)
    corrupt_folder(tmp_path / "alone", tmp_path / "single", ["gaussian_noise"], [3], SMALL)
    whole, other, single = (pictures(tmp_path / name) for name in ("whole", "other", "single"))
    assert single.items() <= whole.items()
    assert not set(whole.values()) & set(other.values())


def test_the_watermark_has_no_severity_and_no_compression(tmp_path, images, monkeypatch):
    settings = replace(SMALL, size=36, font=FONT)
    monkeypatch.setattr("sda_fast.stages.corrupt.watermark", lambda image, font: watermark(image, font, "short"))
    corrupt_folder(images, tmp_path / "out", ["watermark"], [1, 2], settings)
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3
    array = center_crop(read_image(images / "ant/1.png"), 36)
    np.testing.assert_array_equal(read_image(tmp_path / "out/watermark/ant/1.png"), watermark(array, FONT, "short"))


def test_what_cannot_be_read_is_named_and_the_rest_is_done(tmp_path, images, cli):
    (images / "ant" / "2.jpg").write_bytes(b"torn")
    command = ("corrupt", "-i", images, "-o", tmp_path / "out", "--corruption", "fog", "--severity", 1)
    command = (*command, "--size", 32, "--resize", 36, "--json")
    said = cli(*command)
    assert (said.code, json.loads(said.out)["images"]) == (3, 2)
    assert "all is done but 1 file of the input (ant/2.jpg)" in said.err
    assert read_failures(tmp_path / "out").keys() == {"ant/2.jpg"}
    shutil.copy(images / "ant" / "1.png", images / "ant" / "2.jpg")
    assert cli(*command).code == 0
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3
