"""The conditions of a test set: images below `[<corruption>/[<severity>/]]<class>/`, as in ImageNet-C."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from sda_fast.data.images import ImageFile

_SEVERITIES = tuple("12345")


def by_condition(files: Sequence[ImageFile]) -> dict[str, list[ImageFile]]:
    """The images by the path above their class folder, "" for a plain folder of classes; both orders are kept."""
    found: dict[str, list[ImageFile]] = defaultdict(list)
    for file in files:
        found[condition_of(file.name)].append(file)
    return dict(found)


def condition_of(name: str) -> str:
    """The path above the class folder of an image's name."""
    return "/".join(name.split("/")[:-2])


def below_condition(file: ImageFile) -> str:
    """Class and name of an image without its suffix: the same under every condition."""
    return "/".join(file.key.split("/")[-2:])


def describe(condition: str, root: str | Path) -> tuple[str, int]:
    """Corruption and severity (1 to 5; 0: none given) of a condition below `root`.

    What the path below `root` leaves open, the end of `root` itself says: that of a single corruption or severity.
    """
    names = condition.split("/") if condition else []
    above = Path(root).resolve()
    if not names:
        names, above = [above.name], above.parent
    if names[-1] not in _SEVERITIES:
        return "/".join(names), 0
    return "/".join(names[:-1]) or above.name, int(names[-1])
