"""The square crop that diffusion models are trained on."""

import numpy as np
from PIL import Image

from sda_fast.errors import SdaError


def center_crop(array: np.ndarray, size: int) -> np.ndarray:
    """The central `size` x `size` square of an image whose short side is first brought to `size`.

    An image at least twice too large is halved by box averaging as often as it can be, then resized
    bicubically: this is the crop of guided-diffusion, and the result equals its result bit for bit.

    `array` is uint8 [H, W, 3] of any size, larger or smaller; the result is uint8 [size, size, 3].
    Raises SdaError for another dtype, another shape or a size below one.
    """
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise SdaError(f"center_crop takes uint8 of shape [H, W, 3], not {array.dtype} of {list(array.shape)}.")
    if size < 1:
        raise SdaError(f"center_crop cannot crop to {size} pixels: choose a size of one or more.")

    image = Image.fromarray(array)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    # Python's round, half to even, as the original: int(x + 0.5) would differ by a pixel on some shapes.
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)

    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))


def resize_short_side(array: np.ndarray, size: int) -> np.ndarray:
    """Bring the short side of uint8 [H, W, 3] to `size`, bicubically, as classifiers' evaluation transforms do."""
    height, width = array.shape[:2]
    short = min(height, width)
    shape = (size * width // short, size * height // short)
    return (
        array if shape == (width, height) else np.array(Image.fromarray(array).resize(shape, Image.Resampling.BICUBIC))
    )
