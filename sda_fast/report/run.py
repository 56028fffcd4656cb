"""The report of a whole run: tables, pictures and one HTML page."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sda_fast.data import ImageFile, list_images, read_image
from sda_fast.files import write_json
from sda_fast.report.html import write_report
from sda_fast.report.pictures import accuracy_bars, picture_grid
from sda_fast.report.tables import accuracy_table, comparison_table
from sda_fast.report.writers import to_text, write_tables

PAIRS = (("DDA", "Source"), ("SDA", "DDA"), ("SDA", "SDA, not aligned"))
TITLES = {"diffpure": "DiffPure", "dda": "projected"}


def write_run_report(output: str | Path, result: Mapping[str, Any], *, command: str) -> tuple[str, dict[str, str]]:
    """Write results.json, results.md, results.csv, bars.png, grid.png and report.html into `output`.

    result: what `pipeline.run` returns. Returns the tables as text for a terminal and the files by kind.
    """
    root = Path(output)
    rows: Sequence[dict[str, Any]] = result["rows"]
    methods = {row["method"] for row in rows}
    pairs = [pair for pair in PAIRS if methods.issuperset(pair)]
    tables = accuracy_table(rows, layout="tall")
    comparisons = [comparison_table(rows, pairs)] if pairs else []
    bars = accuracy_bars(rows, root / "bars.png")
    grid = write_grid(result["folders"], root / "grid.png")
    figures = [("Accuracy per corruption, with 95 % intervals.", bars)]
    if grid is not None:
        figures.append(("Test images: clean where known, corrupted, and their projections.", grid))
    write_json({"seconds": result["seconds"], "settings": result["settings"], "rows": rows}, root / "results.json")
    write_tables(root / "results.md", [*tables, *comparisons])
    write_tables(root / "results.csv", tables)
    report = write_report(
        root / "report.html",
        "Synthetic-Domain Alignment",
        rows,
        comparisons=comparisons,
        figures=figures,
        settings=result["settings"],
        environment=environment(),
        commands=[command],
        notes=[f"Seconds per stage: {', '.join(f'{k} {v}' for k, v in result['seconds'].items())}."],
    )
    files = {
        "report": report,
        "pictures": grid,
        "bars": bars,
        "table": root / "results.md",
        "rows": root / "results.json",
    }
    return to_text([*tables, *comparisons]), {kind: str(path) for kind, path in files.items() if path is not None}


def environment() -> dict[str, str]:
    """What a figure depends on beside the settings."""
    import torch

    from sda_fast import __version__

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {"sda-fast": __version__, "torch": torch.__version__, "python": platform.python_version(), "device": device}


def write_grid(folders: Mapping[str, str], path: Path, rows: int = 15) -> Path | None:
    """A picture grid with one image of each corruption, a different class each time; None where there is none."""
    target = list_images(folders["target"])
    groups: dict[str, list[ImageFile]] = {}
    for file in target:
        groups.setdefault("/".join(file.name.split("/")[:-2]), []).append(file)
    clean = {"/".join(file.key.split("/")[-2:]): file for file in groups.pop("clean", [])}
    chosen = [(name, files[i * len(files) // len(groups)]) for i, (name, files) in enumerate(groups.items())][:rows]
    if not chosen:
        return None
    columns = []
    originals = [clean.get("/".join(file.key.split("/")[-2:])) for _, file in chosen]
    if all(originals):
        columns.append(("original", [file.path for file in originals if file]))
    columns.append(("corrupted", [file.path for _, file in chosen]))
    for kind in ("diffpure", "dda"):
        if kind in folders:
            projections = {file.key: file.path for file in list_images(folders[kind])}
            columns.append((TITLES[kind], [projections[file.key] for _, file in chosen]))
    pictures = [(title, [read_image(p) for p in paths]) for title, paths in columns]
    return picture_grid(pictures, [group.replace("/", " ") for group, _ in chosen], path)
