import numpy as np
import pytest
from PIL import Image

from sda_fast.report import Picture, PictureTable, picture_grid
from sda_fast.report.pictures import table_grid


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


def test_a_picture_table_as_a_grid(tmp_path):
    images = patches(4, 24)
    rows = tuple((f"row {i}", (Picture(images[2 * i], "a"), Picture(images[2 * i + 1], "b"))) for i in range(2))
    picture = opened(table_grid(PictureTable("T", ("one", "other"), rows), tmp_path / "grid.png"))
    for image in images:  # enlarged to 96 pixels
        assert contains(picture, np.kron(image, np.ones((4, 4, 1), np.uint8)))
