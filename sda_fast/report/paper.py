"""The paper's tables 1 and 2: one line per model, one column per method, the gain of SDA over DDA in parentheses."""

import json
from collections.abc import Sequence
from pathlib import Path

from sda_fast.report.approximations import with_approximations
from sda_fast.report.corruption_error import Baseline, mce_table
from sda_fast.report.results import ModelResults, by_model
from sda_fast.report.tables import MISSING, Cell, Table, accuracy_table
from sda_fast.report.writers import write_tables
from sda_fast.statistics import MeanAccuracy, Row

GAIN = ("SDA", "DDA")  # the first method's cell tells what it has over the second


def paper_table(rows: Sequence[Row]) -> Table:
    """Accuracy in percent: the mean over corruptions (table 1, ImageNet-C) or of the one set (table 2, ImageNet-W).

    Uncorrupted images have no part in a mean over corruptions. A method that was not run on a model, or not under all
    of the corruptions, has no figure. The records hold the 95 % intervals. Raises ValueError as `by_model` does.
    """
    arranged = by_model(rows)
    methods = tuple(dict.fromkeys(row["method"] for row in rows))
    body, records = [], []
    for results in arranged:
        means = {method: mean for method in results.methods if (mean := results.mean(method))}
        best = max(mean.mean for mean in means.values()) if len(means) > 1 else None
        cells = [Cell(_text(method, means), best=method in means and means[method].mean == best) for method in methods]
        body.append((Cell(results.model), *cells))
        for method, mean in means.items():
            names = {"model": results.model, "method": method, "over": _over(results)}
            records.append({**names, "accuracy": mean.mean, "low": mean.low, "high": mean.high, "interval": mean.how})
    over = " / ".join(dict.fromkeys(map(_over, arranged)))
    note = f"In parentheses: {' minus '.join(GAIN)}, in points." if set(GAIN) <= set(methods) else ""
    return Table(f"Accuracy in percent, {over}", ("model", *methods), tuple(body), tuple(records), note=note)


def write_evaluation(
    output: str | Path, rows: Sequence[Row], baseline: Baseline | None = None, name: str | Path = ""
) -> list[Table]:
    """Write `<output>/results.md` and `results.csv`, with a baseline also `mce.csv`; returns the tables of the former.

    output: the folder that `evaluate` wrote. baseline, name: as `mce_table` takes them. Without rows, removes
    those of an earlier call.
    """
    folder = Path(output)
    if not rows:
        for file in ("results.md", "results.csv", "mce.csv"):
            (folder / file).unlink(missing_ok=True)
        return []
    accuracies = accuracy_table(rows, layout="tall")
    errors = [] if baseline is None else mce_table(rows, baseline, name)
    settings = json.loads((folder / "results.json").read_text(encoding="utf-8"))["settings"]
    tables = with_approximations([paper_table(rows), *accuracies, *errors], settings, rows)
    write_tables(folder / "results.md", tables)
    write_tables(folder / "results.csv", accuracies)
    if errors:
        write_tables(folder / "mce.csv", errors)
    return tables


def _text(method: str, means: dict[str, MeanAccuracy]) -> str:
    if method not in means:
        return MISSING
    text = f"{100 * means[method].mean:.1f}"
    if method == GAIN[0] and GAIN[1] in means:
        text += f" ({100 * (means[method].mean - means[GAIN[1]].mean):+.1f})"
    return text


def _over(results: ModelResults) -> str:
    if len(results.corrupted) == 1:
        return results.label(results.corrupted[0])
    severities = ", ".join(map(str, results.severities))
    corruptions = len({corruption for corruption, _ in results.corrupted})
    plural = "severity" if len(results.severities) == 1 else "severities"
    return f"mean over {corruptions} corruption{'s' * (corruptions > 1)}, {plural} {severities}"
