"""The photographs testbed: which of fourteen photographs does a 32x32 patch come from?

The photographs ship inside scikit-image and scikit-learn, so nothing is downloaded. Each is cut into tiles of
64x64 pixels; every third tile (along diagonals) is for testing, the rest for training, so that no training patch
shares a pixel with a test patch.
"""

from functools import lru_cache

import numpy as np
from PIL import Image

from sda_fast.errors import SdaError

SIZE = 32  # pixels of a patch's side
TILE = 64
TEST_PER_CLASS = 100
MIN_CONTRAST = 8.0  # standard deviation of 255: an even sky or a black rim belongs to no photograph

CLASSES = (
    "astronaut",
    "brick",
    "camera",
    "chelsea",
    "china",
    "coffee",
    "coins",
    "flower",
    "grass",
    "gravel",
    "hubble",
    "ihc",
    "motorcycle",
    "retina",
)


@lru_cache(maxsize=len(CLASSES))
def photograph(name: str) -> np.ndarray:
    """The photograph as uint8 [H, W, 3], grey ones repeated, reduced until its short side is below 600 pixels."""
    try:
        import skimage.data
        from sklearn.datasets import load_sample_image
    except ImportError:
        raise SdaError(
            'the photographs come with scikit-image and scikit-learn: pip install "sda-fast[photos]"'
        ) from None
    readers = {
        "hubble": skimage.data.hubble_deep_field,
        "ihc": skimage.data.immunohistochemistry,
        "motorcycle": lambda: skimage.data.stereo_motorcycle()[0],
        "china": lambda: load_sample_image("china.jpg"),
        "flower": lambda: load_sample_image("flower.jpg"),
    }
    reader = readers[name] if name in readers else getattr(skimage.data, name)
    image = Image.fromarray(reader()).convert("RGB")
    while min(image.size) >= 600:
        image = image.reduce(2)
    return np.asarray(image)


def held_out_tiles(image: np.ndarray) -> np.ndarray:
    """Which tiles are for testing: bool [rows, columns]; those at the right and lower rim may be narrower."""
    rows, columns = (-(-side // TILE) for side in image.shape[:2])
    i, j = np.mgrid[:rows, :columns]
    return (i + 2 * j) % 3 == 0


def _contrast(image: np.ndarray) -> np.ndarray:
    """Standard deviation of every 32x32 window, mean over the channels: float64 [H - 31, W - 31]."""

    def window_mean(values: np.ndarray) -> np.ndarray:
        sums = np.pad(values.cumsum(0).cumsum(1), ((1, 0), (1, 0), (0, 0)))
        total = sums[SIZE:, SIZE:] - sums[:-SIZE, SIZE:] - sums[SIZE:, :-SIZE] + sums[:-SIZE, :-SIZE]
        return total / SIZE**2

    x = image.astype(np.int64)
    return np.sqrt(window_mean(x**2) - window_mean(x) ** 2).mean(-1)


@lru_cache(maxsize=len(CLASSES))
def _training_corners(name: str) -> np.ndarray:
    """Top-left corners [M, 2] of all windows that touch no test tile and have contrast."""
    image = photograph(name)
    tiles = held_out_tiles(image).repeat(TILE, 0).repeat(TILE, 1)[: image.shape[0], : image.shape[1]]
    touches = np.lib.stride_tricks.sliding_window_view(tiles, (SIZE, SIZE)).any((2, 3))
    return np.argwhere(~touches & (_contrast(image) >= MIN_CONTRAST))


def training_batch(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """n training patches, uint8 [n, 32, 32, 3], of evenly drawn classes, half of them mirrored; labels int64 [n]."""
    labels = rng.integers(len(CLASSES), size=n)
    patches = np.empty((n, SIZE, SIZE, 3), np.uint8)
    for k, label in enumerate(labels):
        corners = _training_corners(CLASSES[label])
        y, x = corners[rng.integers(len(corners))]
        patch = photograph(CLASSES[label])[y : y + SIZE, x : x + SIZE]
        patches[k] = patch[:, ::-1] if rng.random() < 0.5 else patch
    return patches, labels


def held_out_patches(name: str, n: int = TEST_PER_CLASS) -> np.ndarray:
    """The first n of the class's hundred test patches, uint8 [n, 32, 32, 3].

    They are fixed once and for all and spread evenly over the photograph's test tiles.
    """
    if not 1 <= n <= TEST_PER_CLASS:
        raise SdaError(f"--per-class {n} is out of range: each photograph has {TEST_PER_CLASS} test patches")
    image = photograph(name)
    contrast = _contrast(image)
    rng = np.random.Generator(np.random.PCG64([32, CLASSES.index(name)]))
    tiles = [
        (i * TILE, j * TILE)
        for i, j in np.argwhere(held_out_tiles(image))
        if (i * TILE + SIZE <= image.shape[0]) and (j * TILE + SIZE <= image.shape[1])
    ]
    rng.shuffle(tiles)
    patches: list[np.ndarray] = []
    tries = 0
    while len(patches) < n:
        top, left = tiles[tries % len(tiles)]
        tries += 1
        y = top + rng.integers(min(TILE, image.shape[0] - top) - SIZE + 1)
        x = left + rng.integers(min(TILE, image.shape[1] - left) - SIZE + 1)
        if contrast[y, x] >= MIN_CONTRAST:
            patches.append(image[y : y + SIZE, x : x + SIZE])
    return np.stack(patches)
