"""The watermark of ImageNet-W: a transparent line of text over every image, whatever its class."""

import functools
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sda_fast.errors import SdaError

TEXT = "捷径捷径捷径"  # "shortcut", three times
_ALPHA = 128
# Font size by width, as published; 36 pixels at 224, and in proportion between.
_SIZES = {224: 36, 384: 62, 512: 82, 518: 84}


def watermark(image: np.ndarray, font: str | Path | None = None, text: str = TEXT) -> np.ndarray:
    """A copy of uint8 [H, W, 3] with `text` in half-transparent white, its corner at 1 % of the width and 40 % of the
    height, in letters of a 6.22th of the width.

    font: a file with the letters, by default Source Han Serif SC ExtraLight where the package imagenet-w is installed,
    which holds it; with that one, the result equals that package's.
    Raises SdaError for another kind of image and for a font that is missing, unreadable or lacks the letters.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise SdaError(f"watermark takes uint8 of shape [H, W, 3], not {image.dtype} of {list(image.shape)}.")
    height, width = image.shape[:2]
    letters = _font(str(font or _official_font()), max(1, _SIZES.get(width, int(width / 6.22))), text)
    layer = Image.new("RGBA", (width, height), (255, 255, 255, 0))
    position = (0.01 * width, 0.4 * height)  # fractions of a pixel count
    ImageDraw.Draw(layer).text(position, text, font=letters, fill=(255, 255, 255, _ALPHA))
    marked = Image.alpha_composite(Image.fromarray(image).convert("RGBA"), layer)
    return np.array(marked.convert("RGB"))


@functools.lru_cache(maxsize=16)
def _font(path: str, size: int, text: str) -> ImageFont.FreeTypeFont:
    try:
        font = ImageFont.truetype(path, size)
    except OSError as error:
        raise SdaError(f"--font {path} cannot be read ({error}): give a TrueType or OpenType file.") from error
    nothing = bytes(font.getmask("\uffff"))  # what the font draws for letters it does not have
    for letter in text:
        if letter.strip() and bytes(font.getmask(letter)) == nothing:
            raise SdaError(f"--font {path} has no letter {letter}: give one with {text}, such as Source Han Serif SC.")
    return font


@functools.cache
def _official_font() -> Path:
    try:
        listed = files("imagenet-w") or []
    except PackageNotFoundError:
        listed = []
    for file in listed:
        if file.name == "SourceHanSerifSC-ExtraLight.otf":
            return Path(str(file.locate()))
    raise SdaError(
        "the watermark needs a font with Chinese letters: pip install imagenet-w, which holds the official one, "
        "or give another with --font"
    )
