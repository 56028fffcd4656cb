"""Folders of images: what is in them, what each file is called everywhere, and how one is read and written.

An image is known by its key, its path relative to the folder without the suffix. Originals, projections and
synthetic images are matched by key, classes by folder name; nothing is ever matched by position.
"""

import hashlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from sda_fast.errors import SdaError
from sda_fast.files import write_bytes

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
JPEG_SUFFIXES = (".jpg", ".jpeg")


def _without_suffix(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in SUFFIXES else name


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file: `root` is the folder that was listed, `name` the relative path with forward slashes."""

    root: Path
    name: str

    @property
    def path(self) -> Path:
        return self.root / self.name

    @property
    def key(self) -> str:
        """The name without its suffix: the same for an image and for everything made from it."""
        return _without_suffix(self.name)

    @property
    def class_name(self) -> str:
        """The name of the folder the file lies in."""
        return Path(os.path.abspath(self.path)).parent.name


def list_images(root: str | Path, option: str = "--input") -> list[ImageFile]:
    """Every image below `root`, sorted by name, as `find_images` lists them; nothing may be wrong with the folder.

    Raises SdaError where `find_images` does, and for the first thing that it would report.
    """
    files, failures = find_images(root, option)
    if failures:
        name, reason = next(iter(failures.items()))
        raise SdaError(f"{option} {root} holds {shown(name)}, which {reason}.")
    return files


def find_images(root: str | Path, option: str = "--input") -> tuple[list[ImageFile], dict[str, str]]:
    """Every image below `root` that can be told from the others, sorted by name; and by name, what is wrong elsewhere.

    Images are told by their suffix; hidden files and folders are left out, which includes the temporary files
    of writers at work. Links to folders are followed, except back into a folder that contains them. A link
    that leads nowhere is listed if it has an image's suffix, so that `read_image` reports it by name.

    Reported, with the end of a sentence that begins with the name ("cannot be listed (...): check its rights"):
    images that differ in their suffix alone, since their outputs would collide; folders that are empty or cannot be
    listed, and links to nowhere that seem to have been folders (these names end in a slash); devices and pipes.

    `option` is what the error messages call the folder. Raises SdaError if the folder does not exist, cannot
    be read or holds no image at all.
    """
    root = Path(root)
    if not root.exists():
        raise SdaError(f"{option} {root} does not exist: check the path.")
    if not root.is_dir():
        raise SdaError(f"{option} {root} is a file: give the folder that holds the images.")

    failures: dict[str, str] = {}
    names = sorted(_walk(root, "", (), failures))
    if "" in failures:
        raise SdaError(f"{option} {root} {failures['']}.")
    images = [ImageFile(root, name) for name in names if _without_suffix(name) != name]
    if not images:
        found = f"{len(names)} other files such as {shown(names[0])}" if names else "no files at all"
        raise SdaError(f"{option} {root} holds no image ({', '.join(SUFFIXES)}) but {found}: check the path.")
    by_key: dict[str, list[ImageFile]] = {}
    for file in images:
        by_key.setdefault(file.key, []).append(file)
    for twins in by_key.values():
        for file in twins if len(twins) > 1 else ():
            other = next(twin for twin in twins if twin is not file)
            failures[file.name] = f"differs from {shown(other.name)} in its suffix alone: rename one"
    return [file for file in images if file.name not in failures], failures


def _walk(root: Path, folder: str, ancestors: tuple[tuple[int, int], ...], failures: dict[str, str]) -> Iterator[str]:
    """Names, relative to `root`, of all visible files below `folder` ("" or ending in a slash)."""
    try:
        status = os.stat(root / folder)
        entries = list(os.scandir(root / folder))
    except OSError as error:
        failures[folder] = f"cannot be listed ({error.strerror}): check its rights"
        return
    inode = (status.st_dev, status.st_ino)
    if inode in ancestors:
        return
    if folder and not entries:
        failures[folder] = "is an empty folder: fill or remove it"
    for entry in entries:
        if entry.name.startswith("."):
            continue
        name = folder + entry.name
        # Only links cost a call. isdir says no to one that points at itself, where DirEntry.is_dir would raise.
        link = entry.is_symlink()
        if os.path.isdir(entry.path) if link else entry.is_dir():
            yield from _walk(root, f"{name}/", (*ancestors, inode), failures)
        elif link and not os.path.exists(entry.path) and _without_suffix(name) == name:  # once a folder, it seems
            failures[f"{name}/"] = "is a link that leads nowhere: mend or remove it"
        elif (os.path.isfile(entry.path) or not os.path.exists(entry.path)) if link else entry.is_file():
            yield name
        elif _without_suffix(name) != name:  # reading a pipe would wait for ever
            failures[name] = "is no regular file: remove it"


def shown(name: str) -> str:
    """A file's name for a message: on one line, with line breaks and bytes that are no text escaped."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)


def read_image(path: str | Path) -> np.ndarray:
    """An image as uint8 [H, W, 3], RGB, converted as Pillow's `convert("RGB")` does.

    As Pillow's users expect: transparency is dropped, of an animation the first frame is taken, and the rotation that
    a camera noted in EXIF is not applied. Grey images of 16 bits keep their upper 8, as Pillow does for colour; it
    would clip grey to white.

    Raises SdaError, naming the file, if it is missing, unreadable, no image, damaged, cut short, larger than Pillow
    deems safe, or of a pixel format without a defined range.
    """
    try:
        with Image.open(path) as image:
            if image.mode in ("I", "F"):
                raise ValueError("32-bit levels have no defined range")
            if image.mode.startswith("I;16"):
                return np.stack([(np.asarray(image) >> 8).astype(np.uint8)] * 3, axis=-1)
            return np.array(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise SdaError(
            f"{shown(str(path))} is not an image, whatever its suffix says: replace or remove it."
        ) from error
    except Exception as error:  # a damaged file can lead a decoder to raise nearly anything
        reason = " ".join(shown(str(error)).split()) or type(error).__name__
        raise SdaError(f"{shown(str(path))} cannot be read ({reason}): replace or remove it.") from error


def identity(purpose: str, name: str) -> int:
    """A number in [0, 2^63) that says which image this is: with the user's seed, the key of its noise.

    It depends on the image's key alone (`name` may be the name or the key), so the noise of an image is the
    same whatever was processed before it, beside it or on how many machines. `purpose` names the use
    ("synthesize", "align", "corrupt", ...): with one seed for all stages, a synthetic image would otherwise
    be aligned with the very noise that it was sampled from, and a corruption would be drawn from the noise
    that is to remove it.
    """
    while (key := _without_suffix(name)) != name:  # repeated: a name and its key agree even for a.png.jpg
        name = key
    digest = hashlib.sha256(f"{purpose}\0{name}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


Pairs = list[tuple[ImageFile, ImageFile]]


def pair(originals: Sequence[ImageFile], projections: Sequence[ImageFile]) -> Pairs:
    """Each original with the projection of the same key, in the order of the originals; suffixes may differ.

    Raises SdaError if a counterpart is missing on either side, with the number and the first three.
    """
    by_key = {file.key: file for file in projections}
    keys = {file.key for file in originals}
    _require([file for file in originals if file.key not in by_key], "no projection: align them first")
    _require([file for file in projections if file.key not in keys], "no original: give both in full")
    return [(file, by_key[file.key]) for file in originals]


def _require(missing: list[ImageFile], lack: str) -> None:
    if missing:
        first = ", ".join([shown(file.name) for file in missing[:3]] + ["..."] * (len(missing) > 3))
        raise SdaError(f"{len(missing)} images in {missing[0].root} ({first}) have {lack}.")


class Source(NamedTuple):
    """What an image was made of: the SHA-256 of it in hexadecimal, and when it was written, in nanoseconds."""

    sha256: str
    mtime_ns: int


def write_png(array: np.ndarray, path: str | Path, source: Source | None = None) -> None:
    """Write a uint8 [H, W, 3] image whole or not at all; equal images of equal sources give equal bytes.

    source: its hash stands in the file, see `source_of`, and its time becomes the file's.

    Folders above `path` are made. Raises SdaError for another dtype or shape, or if it cannot be written.
    """
    text = PngImagePlugin.PngInfo()
    if source is not None:
        text.add_text(_SOURCE, source.sha256)
    _write(array, path, "PNG", source, pnginfo=text)


def write_jpeg(array: np.ndarray, path: str | Path, source: Source | None = None) -> None:
    """The same as JPEG with Pillow's defaults, quality 75 and halved chroma: the published code gives no others."""
    _write(array, path, "JPEG", source, **({} if source is None else {"comment": f"{_SOURCE} {source.sha256}"}))


def source_of(path: str | Path) -> str | None:
    """The hash of the `source` that an image was written with, or None. Raises OSError without the file."""
    with open(path, "rb") as file:
        found = _SOURCE_IN_FILE.search(file.read(512))  # before the pixels, as Pillow writes both formats
    return found and found[1].decode()


_SOURCE = "input-sha256"
_SOURCE_IN_FILE = re.compile(rb"input-sha256[\0 ]([0-9a-f]{64})")


def _write(array: np.ndarray, path: str | Path, format: str, source: Source | None, **options: Any) -> None:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise SdaError(f"{format} takes uint8 of shape [H, W, 3], not {array.dtype} of {list(array.shape)}.")
    encoded = io.BytesIO()
    Image.fromarray(array).save(encoded, format=format, **options)
    write_bytes(encoded.getvalue(), path, source and source.mtime_ns)
