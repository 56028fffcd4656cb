import numpy as np
import pytest

from sda_fast.errors import SdaError
from sda_fast.photos import dataset
from sda_fast.photos.dataset import (
    CLASSES,
    MIN_CONTRAST,
    SIZE,
    TEST_PER_CLASS,
    TILE,
    held_out_patches,
    held_out_tiles,
    photograph,
    training_batch,
)


def rng(seed):
    return np.random.Generator(np.random.PCG64(seed))


def test_at_least_fourteen_photographs():
    assert len(set(CLASSES)) == len(CLASSES) >= 14
    assert list(CLASSES) == sorted(CLASSES)
    assert TEST_PER_CLASS >= 100


@pytest.mark.parametrize("name", CLASSES)
def test_photographs_are_large_and_in_colour(name):
    image = photograph(name)
    assert image.dtype == np.uint8
    assert image.shape[2] == 3
    assert 4 * TILE <= min(image.shape[:2]) < 600
    assert photograph(name) is image


@pytest.mark.parametrize("name", CLASSES)
def test_test_patches_are_fixed_and_have_contrast(name):
    patches = held_out_patches(name)
    assert patches.shape == (TEST_PER_CLASS, SIZE, SIZE, 3)
    assert patches.dtype == np.uint8
    assert np.array_equal(held_out_patches(name, 7), patches[:7])
    assert (patches.std((1, 2)).mean(-1) >= MIN_CONTRAST - 1e-9).all()
    assert len({patch.tobytes() for patch in patches}) > 95  # all but chance repetitions differ


def test_the_number_of_test_patches_is_limited():
    for n in (0, TEST_PER_CLASS + 1):
        with pytest.raises(SdaError, match=f"--per-class {n} is out of range"):
            held_out_patches("brick", n)


def numbered(name):
    """A picture like the photograph, but with every pixel's own number in its three channels."""
    height, width = photograph(name).shape[:2]
    number = np.arange(height * width).reshape(height, width)
    return np.stack([number >> 16, number >> 8 & 255, number & 255], -1).astype(np.uint8)


def pixels_of(patches):
    return set((patches.astype(np.int64) @ [65536, 256, 1]).reshape(-1).tolist())


@pytest.mark.parametrize("name", CLASSES)
def test_no_training_patch_shares_a_pixel_with_a_test_patch(name, monkeypatch):
    """Corners are chosen on the photograph, then pixels are replaced by their numbers and patches cut out again."""
    corners = dataset._training_corners(name)
    contrast = dataset._contrast(photograph(name))
    monkeypatch.setattr(dataset, "photograph", numbered)
    monkeypatch.setattr(dataset, "_contrast", lambda image: contrast)
    tested = pixels_of(held_out_patches(name))
    image = numbered(name)
    trained = np.zeros(image.shape[:2], bool)
    for y, x in corners:
        trained[y : y + SIZE, x : x + SIZE] = True
    assert not tested & pixels_of(image[trained])
    assert len(corners) > 1000
    held_out = held_out_tiles(image).mean()
    assert 0.25 < held_out < 0.42  # a third of the tiles


def test_training_batches_are_cut_from_the_training_parts(monkeypatch):
    patches, labels = training_batch(rng(0), 64)
    assert patches.shape == (64, SIZE, SIZE, 3)
    assert labels.dtype == np.int64
    assert set(labels.tolist()) <= set(range(len(CLASSES)))

    monkeypatch.setattr(dataset, "photograph", numbered)
    drawn, again = training_batch(rng(0), 64)
    assert np.array_equal(labels, again)
    mirrored = 0
    for patch, label in zip(drawn, labels, strict=True):
        numbers = patch.astype(np.int64) @ [65536, 256, 1]
        if numbers[0, 0] > numbers[0, 1]:
            numbers, mirrored = numbers[:, ::-1], mirrored + 1
        corner = divmod(int(numbers[0, 0]), photograph(CLASSES[label]).shape[1])
        assert (dataset._training_corners(CLASSES[label]) == corner).all(1).any()
    assert 16 < mirrored < 48


def test_training_batches_depend_on_the_generator_alone():
    (a, labels), (b, same) = training_batch(rng(5), 32), training_batch(rng(5), 32)
    assert np.array_equal(a, b)
    assert np.array_equal(labels, same)
    assert not np.array_equal(training_batch(rng(6), 32)[1], labels)
    counts = np.bincount(training_batch(rng(7), 1400)[1], minlength=len(CLASSES))
    assert counts.min() > 50  # drawn evenly


def test_without_the_libraries_the_way_out_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(SdaError, match=r'pip install "sda-fast\[photos\]"'):
        photograph.__wrapped__("brick")
