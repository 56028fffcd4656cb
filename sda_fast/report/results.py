"""Result rows arranged as one grid of methods by corruptions per model, for tables and pictures alike."""

from collections.abc import Sequence
from dataclasses import dataclass

from sda_fast.statistics import MeanAccuracy, Row, mean_interval, same_images

Column = tuple[str, int]  # corruption, severity
ANY_STREAM = "any"  # the stream of a row that holds for every one


@dataclass(frozen=True)
class ModelResults:
    """All results of one model, in one stream. Methods and columns stand in the order in which they first came."""

    model: str
    methods: tuple[str, ...]
    columns: tuple[Column, ...]
    cells: dict[tuple[str, Column], Row]
    stream: str = ""

    @property
    def title(self) -> str:
        """The model, and the stream where the results name one."""
        return f"{self.model}, {self.stream}" if self.stream else self.model

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
    """Arrange rows, models and then streams in the order in which they first came.

    A row may name the stream of images it was measured in, such as "classes mixed, batches of 1", as `stream`. Each
    stream of a model has a grid of its own; rows that name none, or "any", hold for every stream and stand in each.
    Raises ValueError without rows, or if two rows are about the same method, model, corruption, severity and stream.
    """
    if not rows:
        raise ValueError("there are no results to report")
    arranged = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        streams = dict.fromkeys(stream for row in own if (stream := stream_of(row))) or [""]
        arranged += [_arranged(model, stream, own) for stream in streams]
    return arranged


def stream_of(row: Row) -> str:
    """The stream a row was measured in, "" if it holds for every one."""
    stream = row.get("stream") or ""
    return "" if stream == ANY_STREAM else str(stream)


def first_stream(rows: Sequence[Row]) -> list[Row]:
    """The rows that hold for the first stream of each model: of several streams, the one a report is mainly about."""
    first = {results.model: results.stream for results in reversed(by_model(rows))}
    return [row for row in rows if stream_of(row) in ("", first[row["model"]])]


def _arranged(model: str, stream: str, rows: Sequence[Row]) -> ModelResults:
    own = [row for row in rows if stream_of(row) in ("", stream)]
    cells: dict[tuple[str, Column], Row] = {}
    for row in own:
        key = (row["method"], (row["corruption"], row["severity"]))
        if key in cells:
            raise ValueError(
                f"two results for {row['method']} with {model} under {row['corruption']}, "
                f"severity {row['severity']}: report one run at a time"
            )
        cells[key] = row
    methods = tuple(dict.fromkeys(row["method"] for row in own))
    columns = tuple(dict.fromkeys((row["corruption"], row["severity"]) for row in own))
    return ModelResults(model, methods, columns, cells, stream)


def comparable_pairs(rows: Sequence[Row], further: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    """The pairs to test: each method against the first one, then those of `further` that are there.

    Left out are pairs that were not run on the same images under the same corruptions, which no paired test compares.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    wanted = [(method, methods[0]) for method in methods[1:]]
    wanted += [pair for pair in further if pair not in wanted]
    arranged = by_model(rows)
    return [pair for pair in wanted if _comparable(arranged, *pair)]


def _comparable(arranged: Sequence[ModelResults], first: str, second: str) -> bool:
    both = [results for results in arranged if {first, second} <= set(results.methods)]
    return bool(both) and all(_paired(r.rows(first), r.rows(second)) for r in both)


def _paired(first: Sequence[Row], second: Sequence[Row]) -> bool:
    conditions = [[(row["corruption"], row["severity"]) for row in rows] for rows in (first, second)]
    return conditions[0] == conditions[1] != [] and all(
        a.get("outcomes") and same_images([a, b]) for a, b in zip(first, second, strict=True)
    )
