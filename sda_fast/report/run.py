"""The report of a whole run: tables, pictures and one HTML page, made again from its results whenever one likes."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sda_fast.errors import SdaError
from sda_fast.files import write_json
from sda_fast.report.approximations import approximations, with_approximations
from sda_fast.report.bars import accuracy_bars
from sda_fast.report.examples import before_after, choose_examples, grad_cam_panels, spread
from sda_fast.report.html import write_report
from sda_fast.report.paper import paper_table
from sda_fast.report.pictures import PictureTable, table_grid
from sda_fast.report.results import by_model, comparable_pairs, first_stream, stream_of
from sda_fast.report.tables import Table, accuracy_table, comparison_table
from sda_fast.report.writers import to_text, write_tables
from sda_fast.statistics import Row

PAIRS = (("SDA", "DDA"), ("SDA", "SDA, not aligned"))  # tested beside each method against the first
RESULTS = "results.json"
ROW_KEYS = ("method", "model", "corruption", "severity", "images", "correct", "accuracy", "low", "high", "outcomes")
PANEL_ROWS = 5


def write_run_report(output: str | Path, result: Mapping[str, Any], *, command: str) -> tuple[str, dict[str, str]]:
    """Write results.json, results.md, results.csv, bars.png, grid.png and report.html into `output`.

    result: what `pipeline.run` returns. Returns the tables as text for a terminal, with a sentence for what the report
    had to leave out, and the files by kind.
    """
    root = Path(output)
    rows: Sequence[Row] = result["rows"]
    models = {
        name: {kind: _portable(path, root) for kind, path in files.items()} for name, files in result["models"].items()
    }
    record = {
        "command": command,
        "seconds": result["seconds"],
        "settings": result["settings"],
        "environment": environment(),
        "folders": {kind: _portable(path, root) for kind, path in result["folders"].items()},
        "models": models,
        "rows": rows,
    }
    write_json(record, root / RESULTS)
    tables = accuracy_table(rows, layout="tall")
    overview = with_approximations([paper_table(rows), *tables, *_comparisons(rows)], result["settings"], rows)
    write_tables(root / "results.md", overview)
    write_tables(root / "results.csv", tables)
    files = {"table": root / "results.md", "rows": root / RESULTS}
    files["bars"] = accuracy_bars(rows, root / "bars.png")
    folders = dict(result["folders"])
    if examples := choose_examples(folders.pop("target")):
        files["pictures"] = table_grid(before_after(examples, folders), root / "grid.png")
    page, lacking = report_results(root)
    files = {"report": page, **files}
    text = "\n".join([to_text(overview), *lacking])
    return text, {kind: str(path) for kind, path in files.items()}


def report_results(
    source: str | Path, output: str | Path | None = None, further: Sequence[str | Path] = (), *, grad_cam: bool = True
) -> tuple[Path, list[str]]:
    """Write the HTML page of results and return its path, and a sentence for each part that could not be made.

    source: the folder of a run, a demo or an evaluation (its results.json), or a JSON file: {"rows": [...]}, rows as in
    `sda_fast.statistics`, and where they are known "settings", "environment", "command", "seconds", "folders" and
    "models" as `write_run_report` leaves them. further: JSON files of more rows. output: by default report.html beside
    the results. Images and Grad-CAM need the folders and models of the results where they were, or moved as a whole.
    Raises SdaError for files that are missing or hold something else, and for two results of one thing.
    """
    path = Path(source, RESULTS) if Path(source).is_dir() else Path(source)
    record = _read(path)
    others = [_read(Path(file)) for file in further]
    rows = [row for each in (record, *others) for row in each["rows"]]
    try:
        by_model(rows)
    except ValueError as error:
        raise SdaError(f"{', '.join(map(str, (path, *further)))}: {error}") from error
    pictures, lacking = _pictures(path.parent, record, grad_cam)
    spent = record.get("seconds") or {}  # of a study with the images made in them
    seconds = ", ".join(f"{stage} {t['seconds'] if isinstance(t, dict) else t}" for stage, t in spent.items())
    page = write_report(
        output or path.parent / "report.html",
        "Test-time adaptation with diffusion models",
        rows,
        comparisons=_comparisons(rows),
        pictures=pictures,
        settings=record.get("settings"),
        environment=record.get("environment") or {"of this report": environment()},
        commands=[record["command"]] if "command" in record else [],
        notes=[
            *approximations({str(i): each.get("settings") for i, each in enumerate((record, *others))}, rows),
            *([f"Seconds per stage: {seconds}."] if seconds else []),
            *lacking,
        ],
    )
    return page, lacking


def environment() -> dict[str, str]:
    """What a figure depends on beside the settings."""
    import timm
    import torch

    from sda_fast import __version__

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    versions = {"sda-fast": __version__, "torch": torch.__version__, "timm": timm.__version__}
    return {**versions, "python": platform.python_version(), "device": device}


def _read(path: Path) -> dict[str, Any]:
    """The JSON of results, its rows checked to have what tables ask for."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SdaError(f"{path} cannot be read ({error.strerror}): give a folder of results, or their file") from error
    except ValueError as error:
        raise SdaError(f"{path} is not JSON ({error}): make the results again") from error
    rows = record.get("rows") if isinstance(record, dict) else None
    if not rows or not isinstance(rows, list):
        raise SdaError(f"{path} holds no rows of results: give what run, demo or evaluate wrote")
    for row in rows:
        if lacking := [key for key in ROW_KEYS if not isinstance(row, dict) or key not in row]:
            raise SdaError(f"{path}: a row of results lacks {lacking[0]!r}: make the results again")
    return record


def _comparisons(rows: Sequence[Row]) -> list[Table]:
    """Paired tests in the first stream; where it is one for all models, the note names it and not every line."""
    main = first_stream(rows)
    streams = {stream for row in main if (stream := stream_of(row))}
    if len(streams) == 1:
        main = [{**row, "stream": ""} for row in main]
    if not (pairs := comparable_pairs(main, PAIRS)):
        return []
    table = comparison_table(main, pairs)
    said = f" Order of the images: {streams.pop()}." if len(streams) == 1 else ""
    return [replace(table, note=table.note + said)]


def _pictures(root: Path, record: Mapping[str, Any], grad_cam: bool) -> tuple[list[PictureTable], list[str]]:
    """The image tables that can be made, and why others cannot: a page without them is better than none."""
    pictures: list[PictureTable] = []
    lacking: list[str] = []
    folders = _folders(root, record)
    if "target" not in folders:
        return pictures, lacking
    projections = {kind: folder for kind, folder in folders.items() if kind != "target"}
    try:
        examples = choose_examples(folders["target"])
        if examples:
            pictures.append(before_after(examples, projections))
    except SdaError as error:
        return pictures, [f"No images: {error}"]
    for name, files in (record.get("models") or {}).items() if grad_cam and examples else ():
        source, finetuned = (files[kind] and _found(files[kind], root) for kind in ("source", "finetuned"))
        resize = record["settings"].get("evaluate", {}).get("resize", True)
        try:
            shown = spread(examples, PANEL_ROWS)
            pictures.append(grad_cam_panels(name, source, finetuned, shown, projections, resize=resize))
        except SdaError as error:
            lacking.append(f"No Grad-CAM of {name}: {error}")
    return pictures, lacking


def _folders(root: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """The target and its projections by kind, as far as results tell; an evaluation does in its settings."""
    settings = record.get("settings") or {}
    told = record.get("folders") or {**settings.get("projections", {}), "target": settings.get("input")}
    return {kind: _found(path, root) for kind, path in told.items() if path}


def _portable(path: str | None, root: Path) -> str | None:
    """A file or folder relative to `root` if it lies below, so that it is found where `root` is moved; else absolute.

    What is neither, such as "photos:resnet", stays as it is.
    """
    if path is None or not Path(path).exists():
        return path
    full = Path(path).resolve()
    return str(full.relative_to(root.resolve()) if full.is_relative_to(root.resolve()) else full)


def _found(path: str, root: Path) -> str:
    return str(root / path) if (root / path).exists() else path
