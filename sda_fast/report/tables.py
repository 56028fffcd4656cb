"""Tables of accuracies and of paired comparisons, independent of how they are printed.

A Table holds printable cells for people and, beside them, plain records for the CSV writer.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sda_fast.report.results import Column, ModelResults, by_model
from sda_fast.statistics import PairedTest, Row, mcnemar, paired_over_corruptions

Intervals = Literal["half", "bounds", "none"]
Layout = Literal["wide", "tall", "auto"]
Estimate = tuple[float, float, float]  # accuracy, low, high, as fractions
MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """One printed cell; `best` marks the highest accuracy among the methods."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A titled grid.

    The first `text_columns` columns name the row, all further ones hold figures; the last `summary_rows` rows
    sum up those above them.
    """

    caption: str
    header: tuple[str, ...]
    body: tuple[tuple[Cell, ...], ...]
    records: tuple[dict[str, Any], ...]
    text_columns: int = 1
    summary_rows: int = 0
    note: str = ""


def accuracy_table(rows: Sequence[Row], layout: Layout = "wide", intervals: Intervals = "half") -> list[Table]:
    """Accuracy in percent with 95 % intervals, one table per model, the mean over corruptions last.

    layout: "wide" has methods as rows, "tall" corruptions as rows (narrower, for terminals and phones),
    "auto" is tall where corruptions outnumber methods. intervals: "half" prints "55.7 ±4.1", where ± is the
    larger of the two distances to the bounds (the intervals are not symmetric), "bounds" prints
    "55.7 [51.6, 59.8]", "none" the accuracy alone. Uncorrupted images (severity 0) have a column but no part
    in the mean; a method lacking a corruption has no mean. Raises ValueError without rows or for duplicates.
    """
    return [_accuracy_table(results, layout, intervals) for results in by_model(rows)]


def comparison_table(rows: Sequence[Row], pairs: Sequence[tuple[str, str]], per_corruption: bool = False) -> Table:
    """Paired tests, for every model, of each (method a, method b): the difference is a minus b.

    One line per model and pair over all corruptions (severity 0 apart), preceded by one line per corruption
    if `per_corruption`. A model on which one of the two methods was not run is left out. Raises ValueError if
    that is so for every model, if the methods were run under different corruptions, or without rows or pairs.
    """
    if not pairs:
        raise ValueError("a comparison table needs at least one pair of methods")
    body: list[tuple[Cell, ...]] = []
    records: list[dict[str, Any]] = []
    arranged = by_model(rows)
    for results in arranged:
        for first, second in pairs:
            if {first, second} <= set(results.methods):
                for over, test in _paired_tests(results, first, second, per_corruption):
                    body.append(_comparison_cells(results.title, f"{first} - {second}", over, test))
                    names = {"model": results.title, "first": first, "second": second, "over": over}
                    records.append({**names, **asdict(test)})
    compared = {(record["first"], record["second"]) for record in records}
    for first, second in pairs:
        if (first, second) not in compared:
            known = ", ".join(dict.fromkeys(row["method"] for row in rows))
            raise ValueError(f"cannot compare {first} with {second}: there are results of {known} only")
    header = (
        "model",
        "methods",
        "over",
        "difference",
        "95 % interval",
        "p",
        "only 1st",
        "only 2nd",
        "images",
    )
    note = (
        "Differences of accuracy in percentage points, first method minus second. Over several corruptions: "
        "Student's t on each image's mean difference. One corruption: exact McNemar test and Newcombe's "
        "interval. p is two-sided and not adjusted for the number of comparisons. Only 1st, only 2nd: "
        "outcomes that only that method got right."
    )
    caption = "Paired comparisons of methods on the same images" + (", by corruption" if per_corruption else "")
    return Table(caption, header, tuple(body), tuple(records), text_columns=3, note=note)


def stream_tables(rows: Sequence[Row]) -> list[Table]:
    """Mean accuracy over the corruptions, streams as rows and methods as columns: one table per model with several.

    Methods whose rows hold for every stream stand in each with the same figure. As in the paper's table 8, but for all
    methods.
    """
    tables = []
    arranged = by_model(rows)
    for model in dict.fromkeys(results.model for results in arranged):
        streams = [results for results in arranged if results.model == model]
        if len(streams) > 1:
            methods = list(dict.fromkeys(method for results in streams for method in results.methods))
            tables.append(_stream_table(model, streams, methods))
    return tables


def _stream_table(model: str, streams: Sequence[ModelResults], methods: Sequence[str]) -> Table:
    body: list[tuple[Cell, ...]] = []
    records: list[dict[str, Any]] = []
    for results in streams:
        means = [results.mean(method) if method in results.methods else None for method in methods]
        estimates = [None if mean is None else (mean.mean, mean.low, mean.high) for mean in means]
        body.append((Cell(results.stream), *_accuracy_cells(estimates, "half")))
        for method, mean in zip(methods, means, strict=True):
            if mean is not None:
                bounds = {"accuracy": mean.mean, "low": mean.low, "high": mean.high, "interval": mean.how}
                records.append({"model": model, "stream": results.stream, "method": method, **bounds})
    caption = f"Mean accuracy of {model} in percent, by the order of the images"
    note = "±: the larger distance to the bounds of the 95 % interval."
    return Table(caption, ("stream", *methods), tuple(body), tuple(records), note=note)


def format_p(p: float) -> str:
    """Three decimals; below 0.001 one digit and the power of ten."""
    if p >= 0.001:
        return f"{p:.3f}"
    if p < 1e-300:
        return "<1e-300"
    digit, exponent = f"{p:.0e}".split("e")
    return f"{digit}e{int(exponent)}"


def _accuracy_table(results: ModelResults, layout: Layout, intervals: Intervals) -> Table:
    columns: list[tuple[str, list[Cell]]] = []  # label, one cell per method
    for column in results.columns:
        found = [results.cells.get((method, column)) for method in results.methods]
        estimates = [None if row is None else (row["accuracy"], row["low"], row["high"]) for row in found]
        columns.append((results.label(column), _accuracy_cells(estimates, intervals)))
    if len(results.corrupted) > 1:
        means = [results.mean(method) for method in results.methods]
        estimates = [None if mean is None else (mean.mean, mean.low, mean.high) for mean in means]
        columns.append(("mean", _accuracy_cells(estimates, intervals)))

    header: tuple[str, ...]
    summary_rows = 0
    if layout == "wide" or (layout == "auto" and len(results.columns) <= len(results.methods)):
        header = ("method", *(label for label, _ in columns))
        across = zip(*(cells for _, cells in columns), strict=True)
        body = tuple((Cell(name), *cells) for name, cells in zip(results.methods, across, strict=True))
    else:
        header = ("corruption", *results.methods)
        body = tuple((Cell(label), *cells) for label, cells in columns)
        summary_rows = len(columns) - len(results.columns)
    records = tuple(_accuracy_records(results))
    note = _note(results, intervals)
    return Table(_caption(results), header, body, records, summary_rows=summary_rows, note=note)


def _accuracy_cells(estimates: Sequence[Estimate | None], intervals: Intervals) -> list[Cell]:
    """Cells of one column; the best is marked only where there is something to be better than."""
    present = [estimate[0] for estimate in estimates if estimate is not None]
    best = max(present) if len(present) > 1 else None
    cells = []
    for estimate in estimates:
        if estimate is None:
            cells.append(Cell(MISSING))
            continue
        accuracy, low, high = (100 * value for value in estimate)
        text = f"{accuracy:.1f}"
        if intervals == "half":
            text += f" ±{max(accuracy - low, high - accuracy):.1f}"
        elif intervals == "bounds":
            text += f" [{low:.1f}, {high:.1f}]"
        cells.append(Cell(text, best=estimate[0] == best))
    return cells


def _accuracy_records(results: ModelResults) -> list[dict[str, Any]]:
    """One record per cell with plain fractions, the means under the corruption "mean"."""
    records = []
    for method in results.methods:
        names = {"model": results.title, "method": method}
        for row in (results.cells.get((method, column)) for column in results.columns):
            if row is not None:
                keys = ("corruption", "severity", "images", "correct", "accuracy", "low", "high")
                records.append({**names, **{key: row[key] for key in keys}, "interval": "Wilson"})
        mean = results.mean(method)
        if mean is not None and len(results.corrupted) > 1:
            rows = results.rows(method)
            severity = results.severities[0] if len(results.severities) == 1 else ""
            counts = {key: sum(row[key] for row in rows) for key in ("images", "correct")}
            bounds = {"accuracy": mean.mean, "low": mean.low, "high": mean.high, "interval": mean.how}
            records.append({**names, "corruption": "mean", "severity": severity, **counts, **bounds})
    return records


def _caption(results: ModelResults) -> str:
    caption = f"Accuracy of {results.title} in percent"
    if len(results.severities) == 1 and results.severities != (0,):
        caption += f", severity {results.severities[0]}"
    images = sorted({row["images"] for row in results.cells.values()})
    count = f"{images[0]}" if len(images) == 1 else f"{images[0]} to {images[-1]}"
    return f"{caption}, {count} image{'' if images == [1] else 's'} per corruption"


def _note(results: ModelResults, intervals: Intervals) -> str:
    parts = []
    if intervals != "none":
        how = "±: the larger distance to the bounds of" if intervals == "half" else "In brackets:"
        parts.append(f"{how} the 95 % Wilson interval.")
    if len(results.corrupted) > 1:
        hows = dict.fromkeys(mean.how for mean in map(results.mean, results.methods) if mean is not None)
        interval = f" (interval {' or '.join(hows)})" if hows and intervals != "none" else ""
        parts.append(f"Mean: over the corruptions with equal weight{interval}.")
        if len(results.corrupted) < len(results.columns):
            parts.append("Uncorrupted images are not part of the mean.")
    return " ".join(parts)


def _paired_tests(results: ModelResults, first: str, second: str, per_corruption: bool) -> list[tuple[str, PairedTest]]:
    """(what it runs over, test), single corruptions first."""
    rows_a, rows_b = results.rows(first), results.rows(second)
    pooled = paired_over_corruptions(rows_a, rows_b)
    keys: list[Column] = [(row["corruption"], row["severity"]) for row in rows_a]
    if len(keys) == 1:
        return [(results.label(keys[0]), pooled)]
    tests = []
    if per_corruption:
        by_key = {(row["corruption"], row["severity"]): row for row in rows_b}
        for row, key in zip(rows_a, keys, strict=True):
            tests.append((results.label(key), mcnemar(row["outcomes"], by_key[key]["outcomes"])))
    return [*tests, (f"all {len(keys)}", pooled)]


def _comparison_cells(model: str, methods: str, over: str, test: PairedTest) -> tuple[Cell, ...]:
    texts = (
        model,
        methods,
        over,
        f"{100 * test.difference:+.1f}",
        f"[{100 * test.low:+.1f}, {100 * test.high:+.1f}]",
        format_p(test.p),
        f"{test.b}",
        f"{test.c}",
        f"{test.images}",
    )
    return tuple(map(Cell, texts))
