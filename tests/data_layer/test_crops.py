from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from sda_fast.data import center_crop
from sda_fast.errors import SdaError

# Computed by guided-diffusion's own crop: see tests/data/README.md.
REFERENCE = load_file(Path(__file__).parents[1] / "data" / "center_crop.safetensors")


@pytest.mark.parametrize("case", range(5))
def test_crops_equal_the_original_bit_for_bit(case):
    image, expected = REFERENCE[f"{case}/image"], REFERENCE[f"{case}/crop"]
    cropped = center_crop(image, 64)
    assert cropped.dtype == np.uint8
    assert cropped.flags.c_contiguous
    assert cropped.flags.writeable
    np.testing.assert_array_equal(cropped, expected)


def test_any_shape_gives_the_size_and_the_input_is_untouched():
    rng = np.random.default_rng(0)
    for height, width, size in (
        (1, 1, 8),
        (1, 300, 8),
        (511, 37, 64),
        (64, 64, 64),
        (257, 256, 32),
        (9, 9, 1),
    ):
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        copy = image.copy()
        assert center_crop(image[:, ::-1], size).shape == (size, size, 3)
        np.testing.assert_array_equal(image, copy)
    np.testing.assert_array_equal(center_crop(image, 9), image)  # the right size already


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((9, 9, 3)),
        np.zeros((9, 9), np.uint8),
        np.zeros((9, 9, 4), np.uint8),
        np.zeros((0, 9, 3), np.uint8),
    ],
)
def test_other_arrays_are_refused(array):
    with pytest.raises(SdaError, match="center_crop takes uint8"):
        center_crop(array, 8)


def test_sizes_below_one_are_refused():
    with pytest.raises(SdaError, match="0 pixels"):
        center_crop(np.zeros((9, 9, 3), np.uint8), 0)
