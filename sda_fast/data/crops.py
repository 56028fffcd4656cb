"""What diffusion models and classifiers are shown of a picture: the square they are trained on."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from sda_fast.errors import SdaError

# (uint8 [H, W, 3], (width, height)) -> uint8 [height, width, 3], bicubic with a = -0.5, antialiased
Resample = Callable[[np.ndarray, tuple[int, int]], np.ndarray]


def pillow_bicubic(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] brought to `shape` (width, height) by Pillow: what the published code does."""
    return np.array(Image.fromarray(array).resize(shape, Image.Resampling.BICUBIC))


def torch_bicubic(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The same filter in PyTorch, several times faster; of Pillow's levels a few in a thousand differ, by 1 or 2."""
    x = torch.from_numpy(array).permute(2, 0, 1)[None]
    x = torch.nn.functional.interpolate(x, size=(shape[1], shape[0]), mode="bicubic", antialias=True)
    return x[0].permute(1, 2, 0).numpy()


def center_crop(array: np.ndarray, size: int, resample: Resample = pillow_bicubic) -> np.ndarray:
    """The central `size` x `size` square of an image whose short side is first brought to `size`.

    An image at least twice too large is halved by box averaging as often as it can be, then resized
    bicubically: this is the crop of guided-diffusion, and the result equals its result bit for bit (with
    `pillow_bicubic`).

    `array` is uint8 [H, W, 3] of any size, larger or smaller; the result is uint8 [size, size, 3].
    Raises SdaError for another dtype, another shape, a size below one, or a strip so long and narrow that its short
    side cannot be enlarged to `size` within Pillow's limit of pixels.
    """
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise SdaError(f"center_crop takes uint8 of shape [H, W, 3], not {array.dtype} of {list(array.shape)}.")
    if size < 1:
        raise SdaError(f"center_crop cannot crop to {size} pixels: choose a size of one or more.")

    array = _halved(array, size)
    height, width = array.shape[:2]
    scale = size / min(width, height)
    # Python's round, half to even, as the original: int(x + 0.5) would differ by a pixel on some shapes.
    array = _resized(array, (round(width * scale), round(height * scale)), resample)
    height, width = array.shape[:2]
    left, top = (width - size) // 2, (height - size) // 2
    return array[top : top + size, left : left + size].copy()


def _halved(array: np.ndarray, size: int) -> np.ndarray:
    height, width = array.shape[:2]
    if min(width, height) < 2 * size:
        return array
    image = Image.fromarray(array)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return np.array(image)


def _resized(array: np.ndarray, shape: tuple[int, int], resample: Resample) -> np.ndarray:
    height, width = array.shape[:2]
    if shape == (width, height):
        return array
    if Image.MAX_IMAGE_PIXELS is not None and shape[0] * shape[1] > Image.MAX_IMAGE_PIXELS:
        larger = f"enlarged to {shape[0]}x{shape[1]} it has more pixels than Pillow deems safe"
        raise SdaError(f"a picture of {width}x{height} is too long and narrow ({larger}): crop or remove it.")
    return resample(array, shape)


def resize_short_side(array: np.ndarray, size: int, resample: Resample = pillow_bicubic) -> np.ndarray:
    """Bring the short side of uint8 [H, W, 3] to `size`, bicubically, as classifiers' evaluation transforms do.

    Raises SdaError for a strip too long and narrow to be enlarged.
    """
    height, width = array.shape[:2]
    short = min(height, width)
    return _resized(array, (size * width // short, size * height // short), resample)


@dataclass(frozen=True)
class DiffusionCrop:
    """What a diffusion model of `size` x `size` pixels is shown: `center_crop`."""

    size: int

    def __call__(self, array: np.ndarray, resample: Resample = pillow_bicubic) -> np.ndarray:
        """uint8 [H, W, 3] -> uint8 [size, size, 3]."""
        return center_crop(array, self.size, resample)


@dataclass(frozen=True)
class EvaluationCrop:
    """What a classifier is shown: the short side brought to `resize` (None: left alone), the central square cut out."""

    size: int
    resize: int | None

    def __call__(self, array: np.ndarray, resample: Resample = pillow_bicubic) -> np.ndarray:
        """uint8 [H, W, 3] -> uint8 [size, size, 3]. Raises SdaError for a picture smaller than `size`."""
        if self.resize is not None:
            array = resize_short_side(array, self.resize, resample)
        height, width = array.shape[:2]
        if min(height, width) < self.size:
            sees = f"the classifier sees {self.size}x{self.size}"
            raise SdaError(f"a picture of {width}x{height} is too small, {sees}: use larger images.")
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        return array[top : top + self.size, left : left + self.size]


Crop = DiffusionCrop | EvaluationCrop
