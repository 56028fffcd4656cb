"""The command `checkpoints`: what others publish, fetching it, and classifiers of other formats."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sda_fast.cli.app import Json, app, say
from sda_fast.errors import SdaError

if TYPE_CHECKING:
    from sda_fast.download import Report


@app.command()
def checkpoints(
    fetch: Annotated[str | None, typer.Option(help="Fetch this one of the list, or timm:NAME.")] = None,
    convert: Annotated[Path | None, typer.Option(help="Classifier of another format to convert.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write into.")] = None,
    architecture: Annotated[str | None, typer.Option(help="timm's name of it [recognised: the paper's five].")] = None,
    classes: Annotated[Path | None, typer.Option(help="Class names, one per line [ImageNet's].")] = None,
    mean: Annotated[str | None, typer.Option(help="Of its images' channels, as 0.5,0.5,0.5 [timm's].")] = None,
    std: Annotated[str | None, typer.Option(help="The same: their standard deviation [timm's].")] = None,
    as_json: Json = False,
) -> None:
    """List the checkpoints that are known, fetch one, or convert a classifier into a file of this package."""
    if fetch is not None and convert is not None:
        raise SdaError("--fetch and --convert are two commands: give one of them")
    if (architecture or classes or mean or std) and convert is None:
        raise SdaError("--architecture, --classes, --mean and --std describe the file of --convert: give it")
    if fetch is None and convert is None:
        _list(as_json)
        return
    if output is None:
        raise SdaError("--output is missing: give the folder to write into")
    if convert is not None:
        path = _convert(
            convert, output, convert.stem, architecture, classes, _three("--mean", mean), _three("--std", std)
        )
    elif fetch is not None and fetch.startswith("timm:"):
        path = _convert(fetch, output, fetch.removeprefix("timm:"))
    else:
        path = _fetch(str(fetch), output)
    say({"path": str(path)}, as_json, str(path))


def _fetch(name: str, folder: Path) -> Path:
    from sda_fast.download import fetch

    with _progress() as report:
        return fetch(name, folder, report)


def _convert(
    source: str | Path,
    folder: Path,
    name: str,
    architecture: str | None = None,
    classes: Path | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> Path:
    from sda_fast.data import read_classes
    from sda_fast.models import load_classifier, save_checkpoint

    classifier = load_classifier(source, architecture, read_classes(classes) if classes else None, mean, std)
    metadata = {"kind": "classifier", "config": classifier.config}
    return save_checkpoint(folder / f"{name}.safetensors", classifier, metadata)


def _three(option: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 3:
        raise SdaError(f"{option} {text!r} is not three numbers with commas between them, such as 0.5,0.5,0.5")
    return numbers


def _list(as_json: bool) -> None:
    from sda_fast.published import PUBLISHED

    rows: list[dict[str, Any]] = [
        {
            "name": checkpoint.name,
            "holds": checkpoint.holds,
            "option": checkpoint.option,
            "terms": checkpoint.terms,
            "files": [{"url": f.url, "size": f.size, "checksum": f.checksum} for f in checkpoint.files],
        }
        for checkpoint in PUBLISHED.values()
    ]
    lines = []
    for row in rows:
        lines.append(f"{row['name']}: {row['holds']} ({row['terms']}); {row['option']}")
        for file in row["files"]:
            size = "size not known" if file["size"] is None else f"{file['size']:,} bytes"
            lines += [f"    {file['url']}", f"    {size}, {file['checksum'] or 'no checksum known'}"]
    say({"checkpoints": rows}, as_json, "\n".join(lines))


@contextmanager
def _progress() -> "Iterator[Report]":
    """A bar on standard error where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not sys.stderr.isatty()
    ) as bars:
        tasks: dict[str, Any] = {}

        def report(name: str, done: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done, total=total)

        yield report
