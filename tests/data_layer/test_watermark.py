from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import ImageFont

from sda_fast.data import watermark
from sda_fast.errors import SdaError

# A font that is always there; it has no Chinese letters, so the tests write Latin ones.
FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


def test_white_letters_at_half_strength_where_the_published_ones_are():
    grey = np.full((224, 224, 3), 55, np.uint8)
    marked = watermark(grey, FONT, "short")
    assert marked.dtype == np.uint8
    assert grey.max() == 55  # the input is untouched
    assert marked.max() == 155  # 55 + 128/255 (255 - 55), rounded
    rows, columns = np.nonzero(marked.any(axis=2) & (marked[..., 0] > 60))
    font = ImageFont.truetype(FONT, 36)
    left, top, right, bottom = font.getbbox("short")
    assert (rows.min(), rows.max()) == pytest.approx((0.4 * 224 + top, 0.4 * 224 + bottom), abs=2)
    assert (columns.min(), columns.max()) == pytest.approx((2.24 + left, 2.24 + right), abs=2)


@pytest.mark.parametrize(("width", "size"), [(224, 36), (384, 62), (512, 82), (518, 84), (300, 48), (100, 16)])
def test_letters_grow_with_the_width(width, size):
    black = np.zeros((200, width, 3), np.uint8)
    columns = np.nonzero(watermark(black, FONT, "H")[..., 0])[1]
    left, _, right, _ = ImageFont.truetype(FONT, size).getmask("H").getbbox()
    assert columns.max() - columns.min() + 1 == pytest.approx(right - left, abs=1)


def test_every_image_gets_the_same_mark():
    rng = np.random.default_rng(0)
    image = rng.integers(256, size=(64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(watermark(image, FONT, "ab"), watermark(image.copy(), str(FONT), "ab"))
    moved = np.abs(watermark(image, FONT, "ab").astype(int) - image).any(axis=2)
    mark = watermark(np.zeros_like(image), FONT, "ab").any(axis=2)
    assert not (moved & ~mark).any()


def test_the_published_package_draws_the_same():
    module = pytest.importorskip("imagenet_w", reason="needs pip install imagenet-w")
    import torch

    image = np.random.default_rng(0).integers(256, size=(224, 224, 3), dtype=np.uint8)
    theirs = module.AddWatermark(224)(torch.from_numpy(image).permute(2, 0, 1).float() / 255)
    ours = watermark(image)
    np.testing.assert_array_equal(ours, (255 * theirs).round().byte().permute(1, 2, 0).numpy())


def test_wrong_fonts_and_images_are_named(tmp_path):
    image = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(SdaError, match=r"DejaVuSans\.ttf has no letter 捷: give one with"):
        watermark(image, FONT)
    with pytest.raises(SdaError, match=r"none\.otf cannot be read \(.*\): give a TrueType"):
        watermark(image, tmp_path / "none.otf")
    with pytest.raises(SdaError, match="float64"):
        watermark(image / 255, FONT)


def test_without_a_font_the_package_that_has_one_is_named(monkeypatch):
    from importlib.metadata import PackageNotFoundError

    from sda_fast.data import watermarks

    def nothing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(watermarks, "files", nothing)
    watermarks._official_font.cache_clear()
    with pytest.raises(SdaError, match=r"pip install imagenet-w, .*, or give another with --font"):
        watermark(np.zeros((64, 64, 3), np.uint8))
    watermarks._official_font.cache_clear()
