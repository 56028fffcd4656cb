"""Classes go by name: the folder an image lies in, looked up in the classifier's list of names."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

from sda_fast.data.images import ImageFile
from sda_fast.errors import SdaError

IMAGENET = "imagenet"


def imagenet_classes() -> list[str]:
    """The WordNet identities of ImageNet's 1000 classes, "n01440764" to "n15075141", in the order of every classifier
    trained on it; the list is timm's."""
    from timm.data.imagenet_info import ImageNetInfo

    return list(ImageNetInfo().label_names())


def read_classes(path: str | Path) -> list[str]:
    """The class names in a text file, one per line, in the classifier's order; blank lines are skipped.

    "imagenet" stands for `imagenet_classes()`, unless a file has that name.
    Raises SdaError if the file is missing, is no text, holds no name or holds one twice.
    """
    if str(path) == IMAGENET and not Path(path).exists():
        return imagenet_classes()
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
                f"({', '.join(known)}): put images into folders named like classes, or give models of these classes."
            )
        labels.append(index[file.class_name])
    return labels


def _index_classes(classes: Sequence[str], where: str) -> dict[str, int]:
    index: dict[str, int] = {}
    for i, name in enumerate(classes):
        if index.setdefault(name, i) != i:
            raise SdaError(f"{where} holds {name} twice (entries {index[name] + 1} and {i + 1}): remove one.")
    return index
