"""Bar charts of accuracy per corruption, as in the paper's Figure 3."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sda_fast.files import write_bytes
from sda_fast.report.results import ModelResults, by_model
from sda_fast.statistics import Row

# Okabe and Ito's palette, told apart with any colour vision; its black and yellow are left out, the one
# hiding the error bars and the other too faint on white.
COLOURS = ("#999999", "#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#0072b2", "#d55e00")
HATCHES = ("", "///", "...", "xxx")  # a further method takes the colours again, hatched
ROW_HEIGHT, LETTER = 2.2, 0.08  # inches; of a letter, the width
LONGEST_NAME = 28  # characters


class Group(NamedTuple):
    """The bars over one label: per method accuracy, low and high as fractions, None where it was not run."""

    label: str
    estimates: list[tuple[float, float, float] | None]
    mean: bool = False  # over the corruptions, and so set apart


def accuracy_bars(rows: Sequence[Row], path: str | os.PathLike[str], chance: float | None = None) -> Path:
    """Write a PNG bar chart: one panel per model and stream, one group of bars per corruption, one bar per method.

    Error bars are 95 % intervals; the mean over corruptions stands apart on the right. `chance`, a fraction,
    adds a dashed line at the accuracy of guessing. Raises ValueError without rows or for duplicate rows.
    """
    models = by_model(rows)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    groups = max(len(results.columns) + 1 for results in models)
    width = min(20.0, max(6.4, 1.2 + groups * (0.25 + 0.09 * len(methods))))
    panels = [(results.title, _groups(results, methods)) for results in models]
    figure = _figure(panels, methods, width, 1.0 + 2.5 * len(models), chance)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150, metadata={"Software": None})
    return write_bytes(stream.getvalue(), path)


def bars_svg(results: ModelResults, methods: Sequence[str], width: float) -> bytes:
    """The bars of one model as SVG, `width` inches wide, in as many rows as it takes for bars to be seen.

    methods: in the order of their colours; those the model lacks keep place and colour, so that charts compare.
    """
    import matplotlib

    groups = _groups(results, methods)
    group_width = max(0.5, 0.2 + 0.08 * len(methods))  # inches; labels need some too
    lines = int(np.ceil(len(groups) / max(1, int((width - 0.6) / group_width))))
    length = int(np.ceil(len(groups) / lines))
    panels = [("", groups[start : start + length]) for start in range(0, len(groups), length)]
    figure = _figure(panels, methods, width, 1.0 + ROW_HEIGHT * lines)
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "sda_fast"}):  # names of elements, the same every time
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def bars_text(results: ModelResults) -> str:
    """What the bars show, for who cannot see them: each method's mean and extremes, in percent."""
    sentences = []
    for method in results.methods:
        rows = results.rows(method)
        lowest, highest = (choose(rows, key=lambda row: row["accuracy"]) for choose in (min, max))
        mean = results.mean(method)
        middle = f"mean {100 * mean.mean:.1f} %, " if mean is not None and len(rows) > 1 else ""
        lowest_name, highest_name = (results.label((row["corruption"], row["severity"])) for row in (lowest, highest))
        sentences.append(
            f"{method}: {middle}from {100 * lowest['accuracy']:.1f} % ({lowest_name}) "
            f"to {100 * highest['accuracy']:.1f} % ({highest_name})."
        )
    return f"Bar chart of the accuracy of {results.title} under each corruption. " + " ".join(sentences)


def _groups(results: ModelResults, methods: Sequence[str]) -> list[Group]:
    groups = []
    for column in results.columns:
        rows = [results.cells.get((method, column)) for method in methods]
        estimates = [(row["accuracy"], row["low"], row["high"]) if row else None for row in rows]
        groups.append(Group(results.label(column), estimates))
    if len(results.corrupted) > 1:
        means = [results.mean(method) if method in results.methods else None for method in methods]
        groups.append(Group("mean", [(mean.mean, mean.low, mean.high) if mean else None for mean in means], mean=True))
    return groups


def _figure(
    panels: Sequence[tuple[str, list[Group]]],
    methods: Sequence[str],
    width: float,
    height: float,
    chance: float | None = None,
) -> Any:
    """One panel below the other, of one scale; what two of them have under their axes alike, the lower one shows."""
    from matplotlib.figure import Figure  # slow to import; and without pyplot, which keeps global state
    from matplotlib.patches import Patch

    figure = Figure(figsize=(width, height), layout="constrained")
    drawn = figure.subplots(len(panels), 1, squeeze=False, sharey=True)[:, 0]
    end = max(2.0, *(_positions(groups)[-1] for _, groups in panels))  # a few bars need not fill the page
    named = [[group.label for group in groups] for _, groups in panels]
    for i, (axes, (title, groups)) in enumerate(zip(drawn, panels, strict=True)):
        _draw(axes, groups, methods, chance)
        axes.set_xlim(-0.6, end + 0.6)
        _label(axes, groups, turned=LETTER * max(map(len, named[i])) > (width - 0.6) / (end + 1.2))
        axes.set_title(_clean(title), loc="left", fontsize="medium", fontweight="bold")
        axes.tick_params(labelbottom=named[i] != (named[i + 1] if i + 1 < len(named) else None))
    run = [i for i in range(len(methods)) if any(group.estimates[i] for _, groups in panels for group in groups)]
    handles: list[Any] = [Patch(label=_clean(methods[i]), **_style(i)) for i in run]
    if chance is not None:
        handles += drawn[0].lines[-1:]
    longest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, min(len(handles), 6, int(width / (0.6 + LETTER * longest))))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)
    return figure


def _style(method: int) -> dict[str, Any]:
    return {"facecolor": COLOURS[method % len(COLOURS)], "hatch": HATCHES[method // len(COLOURS) % len(HATCHES)]}


def _positions(groups: Sequence[Group]) -> NDArray[np.float64]:
    positions = np.arange(len(groups), dtype=float)
    positions[-1] += 0.4 if groups[-1].mean and len(groups) > 1 else 0
    return positions


def _draw(axes: Any, groups: Sequence[Group], methods: Sequence[str], chance: float | None) -> None:
    positions = _positions(groups)
    if groups[-1].mean and len(groups) > 1:
        axes.axvline(positions[-1] - 0.7, color="#bbbbbb", linewidth=0.8)
    width = 0.84 / len(methods)
    for i in range(len(methods)):
        if not any(group.estimates[i] for group in groups):
            continue
        values = [group.estimates[i] or (np.nan,) * 3 for group in groups]
        accuracy, low, high = 100 * np.array(values).T
        axes.bar(
            positions + (i - (len(methods) - 1) / 2) * width,
            accuracy,
            width * 0.92,
            **_style(i),
            yerr=np.maximum(0, [accuracy - low, high - accuracy]),  # the mean's rounding may be a hair below 0
            error_kw={"elinewidth": 0.9, "capsize": 1.8, "capthick": 0.9, "ecolor": "#222222"},
        )
    if chance is not None:
        axes.axhline(100 * chance, color="#222222", linewidth=0.9, linestyle="--", label="chance")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("accuracy, %")
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label(axes: Any, groups: Sequence[Group], turned: bool) -> None:
    labels = [_clean(group.label) for group in groups]
    axes.set_xticks(_positions(groups), labels, rotation=35 if turned else 0, ha="right" if turned else "center")
    axes.tick_params(axis="x", length=0)


def _clean(text: str) -> str:
    """Cut to a length that leaves room for bars, without control characters, and with dollar signs escaped, which
    matplotlib takes for formulas."""
    text = text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"
    return "".join(c if c.isprintable() else "?" for c in text).replace("$", r"\$")
