"""What makes results other than the published algorithm's is said beside them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sda_fast.report.tables import Table
from sda_fast.statistics import Row

JACOBIAN_FREE = "Guided projections (DDA, SDA) are Jacobian-free, an approximation of the published ones."
PARTIAL_GDA = "GDA is without its CLIP and VGG terms, whose networks this package does not ship."
PUBLISHED: dict[str, dict[str, Any]] = {
    "dda": {"respacing": "100", "start": 50, "factor": 4, "scale": 6.0},
    "diffpure": {"respacing": "1000", "start": 150},
}
_NAMES = {"dda": "Guided projections (DDA, SDA)", "diffpure": "DiffPure's projections"}


def approximations(settings: Any, rows: Sequence[Row] = ()) -> list[str]:
    """A sentence for each way in which results are not those of the published algorithm.

    It is looked for anywhere in the settings, also in those that the inputs were made with, and among the methods of
    the rows.
    """
    sentences = [JACOBIAN_FREE for value in _mappings(settings) if value.get("jacobian_free") is True]
    sentences += [sentence for value in _mappings(settings) for sentence in _unpublished(value)]
    sentences += [PARTIAL_GDA for row in rows if row["method"] == "GDA"]
    return list(dict.fromkeys(sentences))


def with_approximations(tables: Sequence[Table], settings: Any, rows: Sequence[Row]) -> list[Table]:
    """The tables, those sentences in the first one's note."""
    if not tables:
        return []
    first, *rest = tables
    return [replace(first, note=" ".join(filter(None, [first.note, *approximations(settings, rows)]))), *rest]


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, Mapping):
        yield value
        for inner in value.values():
            yield from _mappings(inner)


def _unpublished(settings: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for settings of a projection that take other steps or guidance; None stands for what is published."""
    kind = settings.get("projection")
    published = PUBLISHED.get(kind, {}) if isinstance(kind, str) else {}
    if changed := [name for name, usual in published.items() if settings.get(name) not in (None, usual)]:
        given = ", ".join(f"{name} {settings[name]}" for name in changed)
        yield f"{_NAMES[str(kind)]} have {given} (published: {', '.join(str(published[name]) for name in changed)})."
