"""What makes results other than the published algorithm's is said beside them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sda_fast.report.tables import Table

JACOBIAN_FREE = "Guided projections (DDA, SDA) are Jacobian-free, an approximation of the published ones."


def approximations(settings: Any) -> list[str]:
    """A sentence for each approximation that is on anywhere in the settings, in those its inputs were made with too."""

    def holds(value: Any) -> bool:
        return isinstance(value, Mapping) and (value.get("jacobian_free") is True or any(map(holds, value.values())))

    return [JACOBIAN_FREE] if holds(settings) else []


def with_approximations(tables: Sequence[Table], settings: Any) -> list[Table]:
    """The tables, those sentences in the first one's note."""
    if not tables:
        return []
    first, *rest = tables
    return [replace(first, note=" ".join(filter(None, [first.note, *approximations(settings)]))), *rest]
