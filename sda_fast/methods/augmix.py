"""AugMix (Hendrycks et al. 2020) at severity 1, as MEMO draws it: random chains of Pillow's operations, mixed."""

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sda_fast.data import to_uint8, to_unit

WIDTH, DEPTH = 3, 3  # chains, and the most operations in one
# What MEMO's and AugMix's calls of Pillow paint where a moved picture has no pixels: they ask for grey 128 in a way
# that Pillow reads as red.
DARK_RED = (128, 0, 0)

Colour = tuple[int, int, int]
Operation = Callable[[Image.Image, np.random.Generator, Colour], Image.Image]


def augmix_views(
    image: Tensor, views: int, rng: np.random.Generator, size: int | None = None, fill: Colour = DARK_RED
) -> Tensor:
    """AugMix of random crops, each mirrored or not: float32 [views, 3, size, size] in [-1, 1], on the CPU.

    image: float [3, H, W] in [-1, 1], rounded to 8 bits; size: by default H.
    """
    picture = _picture(image)
    results = []
    for _ in range(views):
        crop = random_resized_crop(picture, size or image.shape[-2], rng)
        if rng.random() < 0.5:
            crop = ImageOps.mirror(crop)
        m, mixture = _mixture(crop, rng, fill)
        results.append(m * _unit(crop) + (1 - m) * mixture)
    return torch.stack(results)


def augmix_parts(image: Tensor, views: int, rng: np.random.Generator, fill: Colour = DARK_RED) -> tuple[Tensor, Tensor]:
    """(m [views, 1, 1, 1], mixtures [views, 3, H, W]) of an image [3, H, W], uncropped: the views are
    m x + (1 - m) mixture, of which a caller can differentiate the first part."""
    picture = _picture(image)
    m, mixtures = zip(*(_mixture(picture, rng, fill) for _ in range(views)), strict=True)
    return torch.tensor(m).reshape(-1, 1, 1, 1), torch.stack(mixtures)


def random_resized_crop(picture: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A crop of 8 to 100 % of the area and a ratio of 3/4 to 4/3, scaled to a square (Szegedy et al. 2015).

    Where ten draws do not fit, the largest centred crop whose ratio does.
    """
    width, height = picture.size
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    return picture.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BILINEAR)


def _mixture(picture: Image.Image, rng: np.random.Generator, fill: Colour) -> tuple[float, Tensor]:
    """The weight m ~ Beta(1, 1) of the picture itself, and the mixture of its chains with Dirichlet(1) weights."""
    weights, m = rng.dirichlet([1.0] * WIDTH), float(rng.beta(1.0, 1.0))
    mixture = torch.zeros(3, picture.height, picture.width)
    for weight in weights:
        chain = picture
        for _ in range(rng.integers(1, DEPTH + 1)):
            chain = OPERATIONS[rng.integers(len(OPERATIONS))](chain, rng, fill)
        mixture += float(weight) * _unit(chain)
    return m, mixture


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(to_uint8(image.detach()[None])[0])


def _unit(picture: Image.Image) -> Tensor:
    return to_unit(np.array(picture))[0]  # np.array: a copy that may be written to


def _level(rng: np.random.Generator) -> float:
    """Of ten; severity 1 draws the lowest tenth."""
    return rng.uniform(0.1, 1.0)


def _either_sign(value: float, rng: np.random.Generator) -> float:
    return -value if rng.random() < 0.5 else value


def _autocontrast(picture: Image.Image, rng: np.random.Generator, fill: Colour) -> Image.Image:
    return ImageOps.autocontrast(picture)


def _equalize(picture: Image.Image, rng: np.random.Generator, fill: Colour) -> Image.Image:
    return ImageOps.equalize(picture)


def _posterize(picture: Image.Image, rng: np.random.Generator, fill: Colour) -> Image.Image:
    return ImageOps.posterize(picture, 4 - int(_level(rng) / 10 * 4))


def _solarize(picture: Image.Image, rng: np.random.Generator, fill: Colour) -> Image.Image:
    return ImageOps.solarize(picture, 256 - int(_level(rng) / 10 * 256))


def _rotate(picture: Image.Image, rng: np.random.Generator, fill: Colour) -> Image.Image:
    degrees = _either_sign(int(_level(rng) / 10 * 30), rng)
    return picture.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=fill)


def _affine(picture: Image.Image, matrix: tuple[float, ...], fill: Colour) -> Image.Image:
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=fill)


def _shear_x(picture: Image.Image, rng: np.random.Generator, fill: Colour) -> Image.Image:
    return _affine(picture, (1, _either_sign(_level(rng) / 10 * 0.3, rng), 0, 0, 1, 0), fill)


def _shear_y(picture: Image.Image, rng: np.random.Generator, fill: Colour) -> Image.Image:
    return _affine(picture, (1, 0, 0, _either_sign(_level(rng) / 10 * 0.3, rng), 1, 0), fill)


def _translate_x(picture: Image.Image, rng: np.random.Generator, fill: Colour) -> Image.Image:
    pixels = _either_sign(int(_level(rng) / 10 * picture.width / 3), rng)
    return _affine(picture, (1, 0, pixels, 0, 1, 0), fill)


def _translate_y(picture: Image.Image, rng: np.random.Generator, fill: Colour) -> Image.Image:
    pixels = _either_sign(int(_level(rng) / 10 * picture.height / 3), rng)
    return _affine(picture, (1, 0, 0, 0, 1, pixels), fill)


OPERATIONS: tuple[Operation, ...] = (
    _autocontrast, _equalize, _posterize, _rotate, _solarize, _shear_x, _shear_y, _translate_x, _translate_y,
)  # fmt: skip
