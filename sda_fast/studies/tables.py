"""The tables of the SDA paper from the rows of a study."""

from collections.abc import Sequence
from typing import Literal

from sda_fast.report.tables import MISSING, Cell, Estimate, Table, _accuracy_cells, comparison_table
from sda_fast.statistics import Row, mean_interval
from sda_fast.studies.ablate import UNALIGNED, cfg_per_class, numbers, of_number, of_scale, scales
from sda_fast.studies.compare import Result, of_usual_stream
from sda_fast.studies.config import StudyConfig
from sda_fast.studies.streams import ANY

NOTE = (
    "Mean over the corruptions with equal weight, in percent. ±: the larger distance to the bounds of the 95 % "
    "interval (Wilson's, clustered by image)."
)
Line = tuple[tuple[str, ...], list[list[Row]]]  # what names it; for each column, rows of one method and model


def mean_table(
    caption: str, names: Sequence[str], columns: Sequence[str], lines: Sequence[Line], best: Literal["across", "down"]
) -> Table:
    """Mean accuracies with intervals; a cell without rows is empty. best: along which way the best one is marked."""
    estimates: list[list[Estimate | None]] = []
    for _, cells in lines:
        means = [mean_interval(rows) if rows else None for rows in cells]
        estimates.append([m and (m.mean, m.low, m.high) for m in means])
    if best == "across":
        printed = [_accuracy_cells(line, "half") for line in estimates]
    else:
        down = [_accuracy_cells(column, "half") for column in zip(*estimates, strict=True)]
        printed = [list(line) for line in zip(*down, strict=True)]
    body = [(*map(Cell, texts), *figures) for (texts, _), figures in zip(lines, printed, strict=True)]
    records = []
    for (texts, cells), values in zip(lines, estimates, strict=True):
        for column, estimate, rows in zip(columns, values, cells, strict=True):
            accuracy, low, high = estimate or (None, None, None)
            named = {**dict(zip(names, texts, strict=True)), "column": column}
            counts = {"corruptions": len(rows), "images": sum(row["images"] for row in rows)}
            records.append({**named, **counts, "accuracy": accuracy, "low": low, "high": high})
    return Table(caption, (*names, *columns), tuple(body), tuple(records), text_columns=len(names), note=NOTE)


def comparison_tables(result: Result) -> list[Table]:
    """Tables 1 and 2, table 8 where methods learn from their stream, table 3 and times; and paired tests."""
    usual = of_usual_stream(result.rows, result.usual)
    learning = list(dict.fromkeys(row["method"] for row in result.rows if row["stream"] != ANY))
    tables = [_by_model(usual, learning, result.usual)]
    if pairs(usual):
        tables.append(comparison_table(usual, pairs(usual)))
    if learning:
        tables.append(sensitivity_table(result.rows))
        if tests := stream_tests(result.rows, ["Source"]):
            tables.append(tests)
    return [*tables, *time_tables(result)]


def ablation_tables(result: Result, config: StudyConfig) -> list[Table]:
    """Tables 4, 5 and 6, and paired tests of each variant against DDA and against SDA."""
    most, n = config.synthesize.per_class, cfg_per_class(config)
    components = [
        ("Source", "Source"),
        ("DDA, projection alone", "DDA, projection alone"),
        ("DDA", "DDA"),
        ("+ conditional data synthesis", UNALIGNED),
        ("+ unconditional alignment (SDA)", "SDA"),
        ("SDA, projection alone", "SDA, projection alone"),
    ]
    counts = [("DDA", "0", "DDA"), *(("SDA", f"{k}", of_number(k)) for k in numbers(config)), ("SDA", f"{most}", "SDA")]
    base = "SDA" if n == most else of_number(n)
    guided = [(f"{config.synthesize.cfg_scale}", base), *((f"{s}", of_scale(s, n)) for s in scales(config))]
    tables = [
        _by_label("Components (paper, table 4)", ("component",), components, result.rows),
        _by_label("Number of fine-tuning images (paper, table 5)", ("method", "images per class"), counts, result.rows),
    ]
    if scales(config):
        caption = f"Classifier-free guidance, {n} images per class (paper, table 6)"
        tables.append(_by_label(caption, ("guidance",), guided, result.rows))
    return [*tables, comparison_table(result.rows, pairs(result.rows, "DDA", "SDA"))]


def sensitivity_table(rows: Sequence[Row]) -> Table:
    """Table 8: methods that learn from their stream under each, then those whose result holds for every one."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    keys = ("method", "mixed_classes", "mixed_corruptions", "reset", "batch_size")
    ordered = sorted(rows, key=lambda row: row["stream"] == ANY)  # stable
    lines: list[Line] = []
    for key in dict.fromkeys(tuple(row[k] for k in keys) for row in ordered):
        cells = [[r for r in rows if r["model"] == model and tuple(r[k] for k in keys) == key] for model in models]
        method, *stream = key
        lines.append(((method, *(_said(value) for value in stream)), cells))
    names = ("method", "mixed classes", "mixed corruptions", "reset", "batch size")
    return mean_table("Sensitivity to the stream (paper, table 8)", names, models, lines, "down")


def time_tables(result: Result) -> list[Table]:
    """Table 3, and the seconds of one process for an image in every stage and method."""
    models = list(dict.fromkeys(row["model"] for row in result.rows))
    body, records = [], []
    for model in models:
        trained = result.pretraining.get(model)
        tuned = result.seconds.get(f"finetune {model} on aligned", {}).get("seconds")
        share = f"{100 * tuned / trained:.1f} %" if trained and tuned else MISSING
        body.append(tuple(map(Cell, (model, _figure(trained), _figure(tuned), share))))
        records.append({"model": model, "pretraining": trained, "finetuning": tuned})
    header = ("model", "pretraining", "fine-tuning", "share")
    note = "Seconds; – where they were not measured: weights from elsewhere, a fine-tuning done before or interrupted."
    costs = Table("Training time (paper, table 3)", header, tuple(body), tuple(records), note=note)
    lines = [
        (stage, "–", spent["seconds"] / spent["images"])
        for stage, spent in result.seconds.items()
        if not stage.startswith("finetune")
    ]
    keys = ("method", "batch_size", "model")
    for key in dict.fromkeys(tuple(row[k] for k in keys) for row in result.rows):
        method, size, model = key
        own = [row for row in result.rows if tuple(row[k] for k in keys) == key]
        mean = sum(row["seconds_per_image"] * row["images"] for row in own) / sum(row["images"] for row in own)
        lines.append((method if size is None else f"{method}, batches of {size}", model, mean))
    records = [{"of": name, "model": model, "seconds_per_image": seconds} for name, model, seconds in lines]
    cells = tuple(tuple(map(Cell, (name, model, _figure(seconds)))) for name, model, seconds in lines)
    note = (
        "Seconds of one process for one image; of a method on the CPU, its processor time. DiffPure, DDA and SDA use "
        "the projections, which are counted apart."
    )
    spent = Table("Time per image", ("of", "model", "seconds"), cells, tuple(records), text_columns=2, note=note)
    return [costs, spent]


def pairs(rows: Sequence[Row], *references: str) -> list[tuple[str, str]]:
    """Every method against the first reference there is, and the second against every other one."""
    first, second = references or ("Source", "SDA")
    methods = _methods(rows)
    found = [(method, first) for method in methods if first in methods and method != first]
    return found + [(second, m) for m in methods if second in methods and m not in (first, second)]


def stream_tests(rows: Sequence[Row], references: Sequence[str]) -> Table | None:
    """Paired tests of every method that learns from its stream, under each of them, against the references."""
    label = "{method} ({stream})"
    named = [row if row["stream"] == ANY else {**row, "method": label.format(**row), "stream": ANY} for row in rows]
    known = {row["method"] for row in rows if row["stream"] == ANY}
    learning = [method for method in _methods(named) if method not in known]
    tested = [(method, other) for method in learning for other in references if other in known]
    return comparison_table(named, tested) if tested else None


def _by_model(rows: Sequence[Row], learning: Sequence[str], usual: str) -> Table:
    models, methods = list(dict.fromkeys(row["model"] for row in rows)), _methods(rows)
    lines: list[Line] = [
        ((model,), [[r for r in rows if r["model"] == model and r["method"] == method] for method in methods])
        for model in models
    ]
    table = mean_table("All methods (paper, tables 1 and 2)", ("model",), methods, lines, "across")
    note = f"{table.note} Streams of {', '.join(learning)}: {usual}." if learning else table.note
    return Table(table.caption, table.header, table.body, table.records, note=note)


def _by_label(caption: str, names: Sequence[str], lines: Sequence[tuple[str, ...]], rows: Sequence[Row]) -> Table:
    """One line for each (names..., label of the method), one column for each model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    cells: list[Line] = [
        (tuple(texts), [[r for r in rows if r["method"] == label and r["model"] == model] for model in models])
        for *texts, label in lines
    ]
    return mean_table(caption, names, models, cells, "down")


def _methods(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def _said(value: object) -> str:
    if value is None:
        return ANY
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _figure(seconds: float | None) -> str:
    return MISSING if seconds is None else f"{seconds:.3g}" if seconds < 100 else f"{seconds:.0f}"
