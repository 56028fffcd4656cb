"""AugMix (Hendrycks et al. 2020) at severity 1, as MEMO draws it: random chains of Pillow's operations, mixed.

All of a view's random numbers are drawn first; what they ask for is then done in threads, which change no bits.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sda_fast.data import to_uint8
from sda_fast.methods.views import Size, random_box

WIDTH, DEPTH = 3, 3  # chains, and the most operations in one
# What MEMO's and AugMix's calls of Pillow paint where a moved picture has no pixels: they ask for grey 128 in a way
# that Pillow reads as red.
DARK_RED = (128, 0, 0)
MOST_THREADS = 8  # a quarter of the time is spent under Python's lock

Colour = tuple[int, int, int]
Edit = Callable[[Image.Image], Image.Image]
Operation = Callable[[np.random.Generator, Size, Colour], Edit]


class Mixing(NamedTuple):
    """What is drawn for one view: the weight of the picture itself, Beta(1, 1), and chains of operations with
    Dirichlet(1) weights."""

    m: float
    weights: list[float]
    chains: list[list[Edit]]


def augmix_views(
    image: Tensor, views: int, rng: np.random.Generator, size: int | None = None, fill: Colour = DARK_RED
) -> Tensor:
    """AugMix of random crops, each mirrored or not: float32 [views, 3, size, size] in [-1, 1], on the CPU.

    image: float [3, H, W] in [-1, 1], rounded to 8 bits; size: by default H.
    """
    picture = _picture(image)
    size = size or image.shape[-2]

    def draw() -> tuple[Edit, bool, Mixing]:
        return random_resized_crop(rng, picture.size, size), rng.random() < 0.5, draw_mixing(rng, (size, size), fill)

    def view(crop: Edit, mirrored: bool, mixing: Mixing) -> np.ndarray:
        cropped = crop(picture)
        if mirrored:
            cropped = ImageOps.mirror(cropped)
        m = np.float32(mixing.m)
        return m * _unit(cropped) + np.float32(1 - mixing.m) * _mixture(cropped, mixing)

    return _in_threads(image.device, view, [draw() for _ in range(views)])


def augmix_parts(views: Tensor, rng: np.random.Generator, fill: Colour = DARK_RED) -> tuple[Tensor, Tensor]:
    """(m [N, 1, 1, 1], mixtures [N, 3, H, W]) of views [N, 3, H, W] in [-1, 1]: AugMix is m view + (1 - m) mixture.

    Its first part a caller can differentiate, the mixtures hold no gradient.
    """
    pictures = [_picture(view) for view in views]
    drawn = [draw_mixing(rng, picture.size, fill) for picture in pictures]
    m = torch.tensor([mixing.m for mixing in drawn]).reshape(-1, 1, 1, 1)
    return m, _in_threads(views.device, _mixture, list(zip(pictures, drawn, strict=True)))


def random_resized_crop(rng: np.random.Generator, size: Size, side: int) -> Edit:
    """What crops a picture of this size to a `random_box` and scales that to a square."""
    box = random_box(rng, size)
    return lambda picture: picture.crop(box).resize((side, side), Image.Resampling.BILINEAR)


def draw_mixing(rng: np.random.Generator, size: Size, fill: Colour) -> Mixing:
    """size: of the picture; fill: what moved pictures show beyond their edge."""
    weights, m = rng.dirichlet([1.0] * WIDTH), float(rng.beta(1.0, 1.0))
    chains = [
        [OPERATIONS[rng.integers(len(OPERATIONS))](rng, size, fill) for _ in range(rng.integers(1, DEPTH + 1))]
        for _ in weights
    ]
    return Mixing(m, list(weights), chains)


def _in_threads(
    device: torch.device, function: Callable[..., np.ndarray], arguments: Sequence[tuple[object, ...]]
) -> Tensor:
    """What a function gives for each of the arguments, float32 [H, W, 3], as one tensor [N, 3, H, W].

    Threads are as many as PyTorch has, one in a stage's processes, where a method's time is that of its own thread; for
    images of a GPU, which waits meanwhile, as many as there are cores.
    """
    threads = min(MOST_THREADS, torch.get_num_threads() if device.type == "cpu" else os.cpu_count() or 1)
    if threads == 1:
        results = [function(*each) for each in arguments]
    else:
        with ThreadPoolExecutor(threads) as pool:
            results = list(pool.map(lambda each: function(*each), arguments))
    return torch.from_numpy(np.stack(results)).permute(0, 3, 1, 2).contiguous()


def _mixture(picture: Image.Image, mixing: Mixing) -> np.ndarray:
    mixture = np.zeros((picture.height, picture.width, 3), np.float32)
    for weight, chain in zip(mixing.weights, mixing.chains, strict=True):
        edited = picture
        for edit in chain:
            edited = edit(edited)
        mixture += np.float32(weight) * _unit(edited)
    return mixture


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(to_uint8(image.detach()[None])[0])


def _unit(picture: Image.Image) -> np.ndarray:
    """`data.to_unit` to the bit, float32 [H, W, 3]: numpy starts no threads of its own in these."""
    return np.asarray(picture, np.float32) / np.float32(127.5) - np.float32(1)


def _level(rng: np.random.Generator) -> float:
    """Of ten; severity 1 draws the lowest tenth."""
    return rng.uniform(0.1, 1.0)


def _either_sign(value: float, rng: np.random.Generator) -> float:
    return -value if rng.random() < 0.5 else value


def _autocontrast(rng: np.random.Generator, size: Size, fill: Colour) -> Edit:
    return ImageOps.autocontrast


def _equalize(rng: np.random.Generator, size: Size, fill: Colour) -> Edit:
    return ImageOps.equalize


def _posterize(rng: np.random.Generator, size: Size, fill: Colour) -> Edit:
    return partial(ImageOps.posterize, bits=4 - int(_level(rng) / 10 * 4))


def _solarize(rng: np.random.Generator, size: Size, fill: Colour) -> Edit:
    return partial(ImageOps.solarize, threshold=256 - int(_level(rng) / 10 * 256))


def _rotate(rng: np.random.Generator, size: Size, fill: Colour) -> Edit:
    degrees = _either_sign(int(_level(rng) / 10 * 30), rng)
    return lambda picture: picture.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=fill)


def _affine(matrix: tuple[float, ...], fill: Colour) -> Edit:
    affine, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    return lambda picture: picture.transform(picture.size, affine, matrix, bilinear, fillcolor=fill)


def _shear_x(rng: np.random.Generator, size: Size, fill: Colour) -> Edit:
    return _affine((1, _either_sign(_level(rng) / 10 * 0.3, rng), 0, 0, 1, 0), fill)


def _shear_y(rng: np.random.Generator, size: Size, fill: Colour) -> Edit:
    return _affine((1, 0, 0, _either_sign(_level(rng) / 10 * 0.3, rng), 1, 0), fill)


def _translate_x(rng: np.random.Generator, size: Size, fill: Colour) -> Edit:
    return _affine((1, 0, _either_sign(int(_level(rng) / 10 * size[0] / 3), rng), 0, 1, 0), fill)


def _translate_y(rng: np.random.Generator, size: Size, fill: Colour) -> Edit:
    return _affine((1, 0, 0, 0, 1, _either_sign(int(_level(rng) / 10 * size[1] / 3), rng)), fill)


OPERATIONS: tuple[Operation, ...] = (
    _autocontrast, _equalize, _posterize, _rotate, _solarize, _shear_x, _shear_y, _translate_x, _translate_y,
)  # fmt: skip
