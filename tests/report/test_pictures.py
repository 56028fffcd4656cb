import io

import numpy as np
import pytest
from PIL import Image

from sda_fast.report import accuracy_bars, make_row, picture_grid


def patches(count, size=32, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8))


def contains(picture, patch):
    """Whether `patch` stands somewhere in `picture`, pixel by pixel."""
    height, width = patch.shape[:2]
    starts = np.argwhere((picture == patch[0, 0]).all(axis=-1))
    return any(np.array_equal(picture[y : y + height, x : x + width], patch) for y, x in starts)


def opened(path):
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("scale", [1, 3])
def test_grid_shows_every_patch_enlarged(tmp_path, scale):
    columns = [("original", patches(2)), ("corrupted", patches(2, seed=1)), ("projected", patches(2, seed=2))]
    picture = opened(picture_grid(columns, ["chelsea", "coffee"], tmp_path / "grid.png", scale))
    assert picture.shape[0] >= 2 * 32 * scale
    assert picture.shape[1] >= 3 * 32 * scale
    for _, images in columns:
        for image in images:
            assert contains(picture, np.kron(image, np.ones((scale, scale, 1), np.uint8)))


def test_grid_size_does_not_depend_on_short_labels(tmp_path):
    one = opened(picture_grid([("a", patches(3)), ("b", patches(3))], ["x"] * 3, tmp_path / "1.png"))
    # two margins of 12, three rows of 96 with gaps of 6, one line of titles and the gap under it
    title = one.shape[0] - (2 * 12 + 3 * 96 + 3 * 6)
    assert 10 < title < 30
    other = opened(picture_grid([("a", patches(4)), ("b", patches(4))], ["x"] * 4, tmp_path / "2.png"))
    assert other.shape == (one.shape[0] + 96 + 6, one.shape[1], 3)


def test_grid_takes_images_of_different_sizes(tmp_path):
    small, large = patches(1, 8), patches(1, 40, seed=1)
    picture = opened(picture_grid([("a", small), ("b", large)], ["x"], tmp_path / "grid.png", 1))
    assert contains(picture, small[0])
    assert contains(picture, large[0])


def test_grid_survives_any_title(tmp_path):
    titles = ["", "a_very_long_corruption_name/with/folders-and-more", "x" * 5000, "line\nbreak \x1b[31m $x$"]
    columns = [(title, patches(4)) for title in titles]
    picture = opened(picture_grid(columns, titles, tmp_path / "grid.png", 1))
    assert picture.shape[1] < 2000


def test_grid_is_the_same_file_every_time(tmp_path):
    files = [picture_grid([("a", patches(1))], ["x"], tmp_path / f"{i}.png") for i in range(2)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("columns", "titles", "scale", "message"),
    [
        ([], ["x"], 3, "at least one column"),
        ([("a", [])], [], 3, "at least one column"),
        ([("a", patches(2))], ["x"], 3, "'a' has 2 images for 1 rows"),
        ([("a", patches(1))], ["x"], 0, "scale"),
        ([("a", [np.zeros((4, 4, 3))])], ["x"], 3, "uint8"),
        ([("a", [np.zeros((3, 4, 4), np.uint8)])], ["x"], 3, "uint8"),
        ([("a", [np.zeros((0, 4, 3), np.uint8)])], ["x"], 3, "uint8"),
    ],
)
def test_grid_refuses(tmp_path, columns, titles, scale, message):
    with pytest.raises(ValueError, match=message):
        picture_grid(columns, titles, tmp_path / "grid.png", scale)
    assert not list(tmp_path.iterdir())


def bar_rows(methods, corruptions, models=("resnet",)):
    rng = np.random.default_rng(0)
    return [
        make_row(method, model, corruption, 3, rng.random(50) < 0.5)
        for model in models
        for method in methods
        for corruption in corruptions
    ]


def test_bars(tmp_path):
    small = opened(accuracy_bars(bar_rows(["Source", "SDA"], ["fog", "snow"]), tmp_path / "small.png"))
    two = bar_rows(["Source", "SDA"], [f"corruption_{i}" for i in range(15)], ["resnet", "convnext"])
    large = opened(accuracy_bars(two, tmp_path / "large.png", chance=1 / 14))
    assert large.shape[0] > small.shape[0]
    assert large.shape[1] > small.shape[1]
    for picture in (small, large):
        for colour in ((0x99, 0x99, 0x99), (0x56, 0xB4, 0xE9)):  # both methods have been drawn
            assert (picture == colour).all(axis=-1).sum() > 1000


def test_bars_with_gaps_and_odd_names(tmp_path):
    rows = bar_rows([f"$method_{i}$\n{{" for i in range(9)], ["fog", "snow"])
    rows.append(make_row("other", "con$vnext", "fog", 3, [True] * 20))  # other methods, an interval of no width
    assert opened(accuracy_bars(rows[1:], tmp_path / "bars.png")).size


def test_bars_refuse(tmp_path):
    with pytest.raises(ValueError, match="no results"):
        accuracy_bars([], tmp_path / "bars.png")
    assert not list(tmp_path.iterdir())


def test_bars_leave_matplotlib_settings_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    accuracy_bars(bar_rows(["SDA"], ["fog"]), tmp_path / "bars.png")
    assert dict(matplotlib.rcParams) == before
    assert Image.open(io.BytesIO((tmp_path / "bars.png").read_bytes())).format == "PNG"
