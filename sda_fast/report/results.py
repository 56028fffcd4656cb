"""Result rows arranged as one grid of methods by corruptions per model, for tables and pictures alike."""

from collections.abc import Sequence
from dataclasses import dataclass

from sda_fast.statistics import MeanAccuracy, Row, mean_interval

Column = tuple[str, int]  # corruption, severity


@dataclass(frozen=True)
class ModelResults:
    """All results of one model. Methods and columns stand in the order in which they first came."""

    model: str
    methods: tuple[str, ...]
    columns: tuple[Column, ...]
    cells: dict[tuple[str, Column], Row]

    @property
    def corrupted(self) -> tuple[Column, ...]:
        """The columns a mean over corruptions runs over: all but severity 0, unless there is nothing else."""
        return tuple(column for column in self.columns if column[1] != 0) or self.columns

    @property
    def severities(self) -> tuple[int, ...]:
        """Distinct severities of the corrupted columns, ascending."""
        return tuple(sorted({severity for _, severity in self.corrupted}))

    def label(self, column: Column) -> str:
        """A column's name, with its severity where the results have several."""
        corruption, severity = column
        name = corruption.replace("_", " ")
        return f"{name} {severity}" if severity != 0 and len(self.severities) > 1 else name

    def rows(self, method: str) -> list[Row]:
        """The method's rows under the corruptions, in column order; those that are missing are left out."""
        keys = ((method, column) for column in self.corrupted)
        return [self.cells[key] for key in keys if key in self.cells]

    def mean(self, method: str) -> MeanAccuracy | None:
        """Mean over all corruptions; None where the method lacks one, as its mean would not compare."""
        rows = self.rows(method)
        return mean_interval(rows) if len(rows) == len(self.corrupted) else None


def by_model(rows: Sequence[Row]) -> list[ModelResults]:
    """Arrange rows, models in the order in which they first came.

    Raises ValueError without rows, or if two rows are about the same method, model, corruption and severity.
    """
    if not rows:
        raise ValueError("there are no results to report")
    arranged = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        methods = tuple(dict.fromkeys(row["method"] for row in own))
        columns = tuple(dict.fromkeys((row["corruption"], row["severity"]) for row in own))
        cells: dict[tuple[str, Column], Row] = {}
        for row in own:
            key = (row["method"], (row["corruption"], row["severity"]))
            if key in cells:
                raise ValueError(
                    f"two results for {row['method']} with {model} under {row['corruption']}, "
                    f"severity {row['severity']}: report one run at a time"
                )
            cells[key] = row
        arranged.append(ModelResults(model, methods, columns, cells))
    return arranged
