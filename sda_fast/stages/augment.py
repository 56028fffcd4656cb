"""Random pictures of a training image. What is drawn depends on seed, epoch and image, not on who computes it."""

import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sda_fast.data import identity
from sda_fast.errors import SdaError
from sda_fast.stages.epochs import epoch_order, epoch_seeds
from sda_fast.stages.recipes import Recipe


class Augmentation(Protocol):
    def draws(self, seed: int, epoch: int) -> Callable[[int], Any]:
        """From the position of an image to what says how that epoch shows it."""

    def __call__(self, image: np.ndarray, draw: Any) -> Tensor:
        """uint8 [H, W, 3] -> uint8 [S, S, 3]."""


def make_augmentation(recipe: Recipe, size: int, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> Augmentation:
    """The recipe's augmentation to `size` x `size` for files of these names and shapes (height, width).

    Raises SdaError for images that are too small for it.
    """
    if recipe.augment == "shift-flip":
        return ShiftFlip(size, shapes)
    transform = randaugment(size) if recipe.augment == "randaugment" else crop_flip(size)
    return Seeded(transform, [identity("finetune", name) for name in names])


class ShiftFlip:
    """Reflected shifts of up to an eighth, and mirroring. What it draws follows the order of the epoch."""

    def __init__(self, size: int, shapes: Sequence[Sequence[int]]) -> None:
        self._size, self._margin = size, size // 8
        self._places = [[side + 2 * self._margin - size + 1 for side in shape] for shape in shapes]
        for (height, width), places in zip(shapes, self._places, strict=True):
            if min(places) < 1:
                sees = f"the classifier's {size}x{size}"
                raise SdaError(f"images of {width}x{height} are smaller than {sees}: resize them")

    def draws(self, seed: int, epoch: int) -> Callable[[int], tuple[int, int, bool]]:
        generator = random.Random(int(epoch_seeds(seed, epoch).generate_state(1)[0]))
        drawn = {}
        for i in epoch_order(len(self._places), seed, epoch).tolist():
            y, x = (generator.randrange(places) for places in self._places[i])
            drawn[i] = (y, x, generator.random() < 0.5)
        return drawn.__getitem__

    def __call__(self, image: np.ndarray, draw: tuple[int, int, bool]) -> Tensor:
        y, x, mirrored = draw
        margin = (self._margin, self._margin)
        padded = np.pad(image, (margin, margin, (0, 0)), mode="reflect")
        crop = padded[y : y + self._size, x : x + self._size]
        return torch.from_numpy(np.ascontiguousarray(crop[:, ::-1] if mirrored else crop))


class Seeded:
    """A library's transform, which draws from Python's, numpy's and torch's global generators: they are seeded for
    every image."""

    def __init__(self, transform: Any, identities: Sequence[int]) -> None:
        self._transform, self._identities = transform, identities

    def draws(self, seed: int, epoch: int) -> Callable[[int], int]:
        def draw(i: int) -> int:
            return int(np.random.SeedSequence([seed, epoch, self._identities[i]]).generate_state(1, np.uint64)[0])

        return draw

    def __call__(self, image: np.ndarray, draw: int) -> Tensor:
        random.seed(draw)
        np.random.seed(draw % 2**32)
        torch.default_generator.manual_seed(draw)  # torch.manual_seed would seed GPUs as well
        return self._transform(image)


def crop_flip(size: int) -> Any:
    """Random resized crop and mirror; pixels as OpenCV's bilinear filter makes them, to a level."""
    from torchvision.transforms import Compose, RandomHorizontalFlip, RandomResizedCrop

    crop = RandomResizedCrop(size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), antialias=False)
    return Compose([_to_chw, crop, RandomHorizontalFlip(0.5), _to_hwc])


def randaugment(size: int) -> Any:
    """timm's random resized crop (bicubic), mirror, RandAugment and random erasing, with mmpretrain's settings."""
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.data.transforms_factory import transforms_imagenet_train
    from torchvision.transforms import Compose

    # The grey that RandAugment fills with and the noise that erases are ImageNet's, as in the original, whatever
    # the classifier normalises with.
    transform = transforms_imagenet_train(
        size,
        interpolation="bicubic",
        color_jitter=(0.0, 0.0, 0.0),
        auto_augment="rand-m9-mstd0.5-inc1",
        re_prob=0.25,
        re_mode="pixel",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
    )
    return Compose([Image.fromarray, transform, _denormalised])


def _to_chw(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


def _to_hwc(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0).contiguous()


def _denormalised(x: Tensor) -> Tensor:
    """ImageNet-normalised float [3, S, S] -> uint8 [S, S, 3], for which the original's erasing noise is cut too."""
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return _to_hwc((255 * (x * std + mean)).round().clamp(0, 255).to(torch.uint8))
