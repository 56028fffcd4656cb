"""Random views of an image that gradients pass through: crops as classifiers train on, patches as GDA shows to CLIP."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

Size = tuple[int, int]  # width, height
Box = tuple[int, int, int, int]  # left, top, right, bottom

PATCH_SIZE = 224  # what CLIP ViT-B/16 sees
DISTORTION = 0.6  # of the perspective: the most that a corner moves, of half a side
DEGREES, TRANSLATION, SCALE = (30.0, 70.0), (0.1, 0.3), (0.5, 0.75)  # translation: at most, of width and height


def random_box(rng: np.random.Generator, size: Size) -> Box:
    """8 to 100 % of a picture's area at a ratio of 3/4 to 4/3 (Szegedy et al. 2015), anywhere in it.

    Where ten draws do not fit, the largest centred box whose ratio does.
    """
    width, height = size
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
    return left, top, left + w, top + h


def random_crops(x: Tensor, views: int, size: int, rng: np.random.Generator) -> Tensor:
    """Random resized crops of x [1, C, H, W], each mirrored or not: [views, C, size, size], bilinear, antialiased."""
    drawn = [(random_box(rng, (x.shape[-1], x.shape[-2])), rng.random() < 0.5) for _ in range(views)]
    crops = [_resized_crop(x, box, size) for box, _ in drawn]
    return torch.cat([c.flip(-1) if mirrored else c for c, (_, mirrored) in zip(crops, drawn, strict=True)])


def random_patches(x: Tensor, patches: int, rng: np.random.Generator) -> Tensor:
    """Random resized crops of x [1, 3, H, W], each seen in perspective, then turned, moved and made smaller.

    [patches, 3, 224, 224], black (-1) around them; the distributions are those of GDA's published code.
    """
    size, results = PATCH_SIZE, []
    for _ in range(patches):
        patch = _resized_crop(x, random_box(rng, (x.shape[-1], x.shape[-2])), size)
        patch = TF.perspective(patch, _corners(size), _moved_corners(size, rng), fill=[-1.0, -1.0, -1.0])
        degrees, scale = rng.uniform(*DEGREES), rng.uniform(*SCALE)
        shift = [round(rng.uniform(-most * size, most * size)) for most in TRANSLATION]
        nearest = InterpolationMode.NEAREST
        patch = TF.affine(patch, degrees, shift, scale, [0.0, 0.0], interpolation=nearest, fill=[-1.0, -1.0, -1.0])
        results.append(patch)
    return torch.cat(results)


def _resized_crop(x: Tensor, box: Box, size: int) -> Tensor:
    left, top, right, bottom = box
    return F.interpolate(x[..., top:bottom, left:right], (size, size), mode="bilinear", antialias=True)


def _corners(size: int) -> list[list[int]]:
    last = size - 1
    return [[0, 0], [last, 0], [last, last], [0, last]]


def _moved_corners(size: int, rng: np.random.Generator) -> list[list[int]]:
    """Each corner anywhere in a square inwards of it."""
    reach = int(DISTORTION * (size // 2))
    moves = rng.integers(reach + 1, size=(4, 2)).tolist()
    inward = ((1, 1), (-1, 1), (-1, -1), (1, -1))
    return [
        [x + sx * dx, y + sy * dy] for (x, y), (sx, sy), (dx, dy) in zip(_corners(size), inward, moves, strict=True)
    ]
