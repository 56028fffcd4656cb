"""The order in which a method sees the test images, and when it forgets."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sda_fast.data import ImageFile, identity

RESETS = ("corruption", "continual", "batch")
ANY = "any"  # the stream of a row that holds for every one


@dataclass(frozen=True)
class Stream:
    """A stream as the paper's table 8 tells them apart, and when the method is reset.

    mixed_classes: whether images come in random order, or class by class. mixed_corruptions: whether those of all
    corruptions are one stream; if not, one corruption follows the other, and no batch holds two. reset: "corruption",
    before each; "continual", never; "batch", before every batch (episodic).
    """

    mixed_classes: bool
    mixed_corruptions: bool
    batch_size: int
    reset: str

    @property
    def by_corruption(self) -> bool:
        """Whether a corruption's result does not depend on the others, so that it can be had alone."""
        return not self.mixed_corruptions and self.reset != "continual"

    def __str__(self) -> str:
        classes = "classes mixed" if self.mixed_classes else "class by class"
        corruptions = "corruptions mixed" if self.mixed_corruptions else "corruptions apart"
        resets = {"corruption": "reset per corruption", "continual": "continual", "batch": "reset per batch"}
        return f"{classes}, {corruptions}, batches of {self.batch_size}, {resets[self.reset]}"

    @property
    def folder(self) -> str:
        """A name for files of this stream."""
        classes, corruptions = ("mixed" if mixed else "apart" for mixed in (self.mixed_classes, self.mixed_corruptions))
        return f"classes-{classes}_corruptions-{corruptions}_batch-{self.batch_size}_reset-{self.reset}"

    def columns(self) -> dict[str, Any]:
        """What a row says of its stream."""
        return {"stream": str(self), **asdict(self)}


NO_STREAM = {"stream": ANY, **dict.fromkeys(("mixed_classes", "mixed_corruptions", "batch_size", "reset"))}


def segments(stream: Stream, groups: Mapping[str, Sequence[ImageFile]], seed: int = 0) -> list[list[list[ImageFile]]]:
    """The images of all corruptions as batches, and these as parts before each of which the method is reset.

    groups: the images of each corruption, sorted by name. The random order is a function of `seed` and each image's
    key: fewer images come in the same order.
    """

    def place(file: ImageFile) -> tuple[Any, ...]:
        drawn = identity(f"order {seed}", file.key)
        if stream.mixed_classes:
            return (drawn,)
        return (file.class_name, drawn if stream.mixed_corruptions else 0, file.name)

    apart = list(groups.values())
    together = [[file for files in apart for file in files]]
    ordered = [sorted(files, key=place) for files in (together if stream.mixed_corruptions else apart)]
    size = stream.batch_size
    parts = [[files[i : i + size] for i in range(0, len(files), size)] for files in ordered]
    if stream.reset == "corruption":
        return parts
    batches = [batch for part in parts for batch in part]
    return [[batch] for batch in batches] if stream.reset == "batch" else [batches]
