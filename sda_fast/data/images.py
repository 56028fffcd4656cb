"""Folders of images: what is in them, what each file is called everywhere, and how one is read and written.

An image is known by its key, its path relative to the folder without the suffix. Originals, projections and
synthetic images are matched by key, classes by folder name; nothing is ever matched by position.
"""

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from sda_fast.errors import SdaError
from sda_fast.files import write_bytes

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


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
    """Every image below `root`, sorted by name.

    Images are told by their suffix; hidden files and folders are left out, which includes the temporary files
    of writers at work. Links to folders are followed, except back into a folder that contains them. A link
    that leads nowhere is listed, so that `read_image` reports it by name instead of it missing silently.

    `option` is what the error messages call the folder. Raises SdaError if the folder does not exist, cannot
    be read or holds no image, and if two images differ in their suffix alone: their outputs would collide.
    """
    root = Path(root)
    if not root.exists():
        raise SdaError(f"{option} {root} does not exist: check the path.")
    if not root.is_dir():
        raise SdaError(f"{option} {root} is a file: give the folder that holds the images.")

    names = sorted(_walk(root, "", ()))
    files = [ImageFile(root, name) for name in names if _without_suffix(name) != name]
    if not files:
        found = f"{len(names)} other files such as {names[0]}" if names else "no files at all"
        raise SdaError(f"{option} {root} holds no image ({', '.join(SUFFIXES)}) but {found}: check the path.")
    by_key: dict[str, ImageFile] = {}
    for file in files:
        if (first := by_key.setdefault(file.key, file)) is not file:
            both = f"{first.name} and {file.name}"
            raise SdaError(f"{option} {root} holds {both}, whose outputs would collide: rename one.")
    return files


def _walk(root: Path, folder: str, ancestors: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Names, relative to `root`, of all visible files below `folder` ("" or ending in a slash)."""
    try:
        status = os.stat(root / folder)
        entries = list(os.scandir(root / folder))
    except OSError as error:
        raise SdaError(f"{root / folder} cannot be read ({error.strerror}): check its rights.") from error
    inode = (status.st_dev, status.st_ino)
    if inode in ancestors:
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        # isdir says no to a link that points at itself, where DirEntry.is_dir would raise
        link = entry.is_symlink()
        if os.path.isdir(entry.path) if link else entry.is_dir():
            yield from _walk(root, f"{folder}{entry.name}/", (*ancestors, inode))
        elif link or entry.is_file():
            yield folder + entry.name


def read_image(path: str | Path) -> np.ndarray:
    """An image as uint8 [H, W, 3], RGB, converted as Pillow's `convert("RGB")` does.

    Grey images of 16 bits keep their upper 8, as Pillow does for colour; it would clip grey to white. Raises
    SdaError, naming the file, if it is missing, unreadable, no image, damaged, cut short, larger than Pillow
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
        raise SdaError(f"{path} is not an image, whatever its suffix says: replace or remove it.") from error
    except Exception as error:  # a damaged file can lead a decoder to raise nearly anything
        raise SdaError(f"{path} cannot be read ({error}): replace or remove it.") from error


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


def read_classes(path: str | Path) -> list[str]:
    """The class names in a text file, one per line, in the classifier's order; blank lines are skipped.

    Raises SdaError if the file is missing, is no text, holds no name or holds one twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise SdaError(f"class list {path} cannot be read ({reason}): write one name per line.") from error
    classes = [line.strip() for line in lines if line.strip()]
    if not classes:
        raise SdaError(f"class list {path} is empty: write one class name per line.")
    _index_classes(classes, f"class list {path}")
    return classes


def label_indices(files: Iterable[ImageFile], classes: Sequence[str]) -> list[int]:
    """The index in `classes` of the folder each file lies in; any subset of the classes may be present.

    Raises SdaError for a folder that is no class and for a class that is listed twice.
    """
    index = _index_classes(classes, "the class list")
    labels = []
    for file in files:
        if file.class_name not in index:
            known = get_close_matches(file.class_name, classes, n=1) or [*classes[:3], "..."]
            raise SdaError(
                f"the folder {file.class_name} of {file.path} is none of the {len(classes)} classes "
                f"({', '.join(known)}): rename the folder or give the class list it belongs to."
            )
        labels.append(index[file.class_name])
    return labels


def _index_classes(classes: Sequence[str], where: str) -> dict[str, int]:
    index: dict[str, int] = {}
    for i, name in enumerate(classes):
        if index.setdefault(name, i) != i:
            raise SdaError(f"{where} holds {name} twice (entries {index[name] + 1} and {i + 1}): remove one.")
    return index


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
        first = ", ".join([file.name for file in missing[:3]] + ["..."] * (len(missing) > 3))
        raise SdaError(f"{len(missing)} images in {missing[0].root} ({first}) have {lack}.")


def write_png(array: np.ndarray, path: str | Path) -> None:
    """Write a uint8 [H, W, 3] image whole or not at all; equal images give equal bytes.

    Folders above `path` are made. Raises SdaError for another dtype or shape, or if it cannot be written.
    """
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise SdaError(f"write_png takes uint8 of shape [H, W, 3], not {array.dtype} of {list(array.shape)}.")
    encoded = io.BytesIO()
    Image.fromarray(array).save(encoded, format="PNG")
    write_bytes(encoded.getvalue(), path)
