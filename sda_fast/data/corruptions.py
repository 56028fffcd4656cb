"""The fifteen corruptions of ImageNet-C for anyone's images, drawn from a seed per image.

They come from the package imagecorruptions-imaug, an optional one. Motion blur, snow and frost are made there
without ImageMagick, so the result is not the published ImageNet-C set: say so beside any figure.
"""

import functools
import hashlib
import importlib
import threading
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import numpy as np

from sda_fast.errors import SdaError

CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
SMALLEST_SIDE = 32
_DISTRIBUTION = "imagecorruptions-imaug"
# These two ignore numpy's global generator: they draw from one of their own and take its seed.
_TAKES_SEED = ("impulse_noise", "glass_blur")
_global_generator = threading.Lock()


def corrupt(image: np.ndarray, name: str, severity: int, seed: int) -> np.ndarray:
    """A corrupted copy of uint8 [H, W, 3], same shape and dtype; H and W are at least 32.

    The result is a function of the arguments and of the library's version: not of earlier calls, of their
    order, or of any global random state, which is left as it was. `name` and `severity` (1 to 5) enter the
    seed, so that different corruptions of an image do not share their noise. Calls from several threads are
    made one at a time, since the library draws from numpy's global generator; another thread that drew from
    it at the same time would disturb both, so give each its own process.

    Raises SdaError for an unknown name or severity, an image of another kind, or if the library is missing.
    """
    if name not in CORRUPTIONS:
        raise SdaError(f"there is no corruption {name!r}: choose from {', '.join(CORRUPTIONS)}.")
    if severity not in (1, 2, 3, 4, 5):
        raise SdaError(f"the severity of a corruption is 1, 2, 3, 4 or 5, not {severity!r}.")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise SdaError(f"corrupt takes uint8 of shape [H, W, 3], not {image.dtype} of {list(image.shape)}.")
    if min(image.shape[:2]) < SMALLEST_SIDE:
        height, width = image.shape[:2]
        raise SdaError(f"corruptions need {SMALLEST_SIDE} pixels a side, not {width}x{height}: use larger images.")

    library = _load()
    digest = hashlib.sha256(f"{name}\0{int(severity)}\0{int(seed)}".encode()).digest()
    words = np.frombuffer(digest, dtype="<u4")
    own_seed = {"seed": int(words[0])} if name in _TAKES_SEED else {}

    with _global_generator:
        state = np.random.get_state()
        try:
            np.random.seed(words)
            corrupted = library.corrupt(image, severity=int(severity), corruption_name=name, **own_seed)
        finally:
            np.random.set_state(state)
    return np.array(corrupted, order="C")  # a few come back read-only or transposed


def library_version() -> str:
    """Name and version of the library that draws the corruptions, for manifests: its images depend on it.

    Raises SdaError if it is missing.
    """
    try:
        return f"{_DISTRIBUTION} {version(_DISTRIBUTION)}"
    except PackageNotFoundError as error:
        # The import name alone proves nothing: the older imagecorruptions has the same and cannot be seeded.
        raise SdaError(f'corruptions need {_DISTRIBUTION}: pip install "sda-fast[photos]".') from error


@functools.cache
def _load() -> ModuleType:
    library_version()
    try:
        return importlib.import_module("imagecorruptions")
    except ImportError as error:  # installed, but one of its own requirements is not
        raise SdaError(
            f'corruptions need {_DISTRIBUTION}, which cannot be imported ({error}): pip install "sda-fast[photos]".'
        ) from error
