"""A picture per benchmark from the rows of a folder: share of the copy bandwidth, and speed-up over the baseline.

    python benchmarks/plot.py FOLDER [--output FOLDER]      # reads FOLDER/*.jsonl, writes <op>.png

Of several rows of one configuration the last counts. A row whose parity failed has no bar, and says so.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {"plain": "#8c8c8c", "cpp": "#3b6ea5", "triton": "#c7762b", "cuda": "#4f8f4f"}
CONFIGURATION = ("device", "threads", "backend", "shape", "dtype", "layout", "baseline")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, help="by default the folder itself")
    options = parser.parse_args()
    files = sorted(options.folder.glob("*.jsonl"))
    if not files:
        sys.exit(f"{options.folder} holds no *.jsonl; write rows with bench_<op>.py --output {options.folder}")
    output = options.output or options.folder
    output.mkdir(parents=True, exist_ok=True)
    for file in files:
        picture = output / f"{file.stem}.png"
        plot(file.stem, read(file), picture)
        print(picture)


def read(file: Path) -> list[dict[str, Any]]:
    """The last row of every configuration, in the order of their first."""
    latest: dict[str, dict[str, Any]] = {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        latest[str([row.get(name) for name in CONFIGURATION])] = row
    return list(latest.values())


def plot(name: str, rows: list[dict[str, Any]], picture: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.4 + 0.34 * len(rows)), sharey=True, layout="constrained")
    positions = range(len(rows))
    panels = {"fraction_of_copy": "share of the copy bandwidth / %", "speedup": "speed-up over the baseline"}
    for axis, (column, title) in zip(axes, panels.items(), strict=True):
        scale = 100 if column == "fraction_of_copy" else 1
        values = [scale * row.get(column, 0) for row in rows]
        axis.barh(positions, values, height=0.7, color=[COLOURS[row["backend"]] for row in rows])
        for position, value, row in zip(positions, values, rows, strict=True):
            text, shift = _number(row, column, value), {"xytext": (4, 0), "textcoords": "offset points"}
            axis.annotate(text, (value, position), **shift, va="center", fontsize=8)
        axis.axvline(scale, color="black", linewidth=0.8, linestyle=":")
        axis.set_xlim(0, 1.3 * max(scale, *values))
        axis.set_xlabel(title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(positions, [_label(row) for row in rows], fontsize=8)
    axes[0].invert_yaxis()
    places = dict.fromkeys(_place(row) for row in rows)
    figure.suptitle(f"{name}: {'; '.join(places)}", fontsize=10)
    figure.savefig(picture, dpi=130)
    plt.close(figure)


def _label(row: dict[str, Any]) -> str:
    return f"{row['backend']}  {'×'.join(map(str, row['shape']))}  {row['dtype']}  {row['layout']}"


def _number(row: dict[str, Any], column: str, value: float) -> str:
    if "p50" not in row:
        return "parity failed"
    if column not in row:
        return ""
    return f"{value:.0f}" if column == "fraction_of_copy" else f"{value:.2f}× {row['baseline']}"


def _place(row: dict[str, Any]) -> str:
    threads = "" if row["cuda"] else f", {row['threads']} thread{'s' * (row['threads'] > 1)}"
    return f"{row['device']}{threads}, torch {row['torch']}"


if __name__ == "__main__":
    main()
