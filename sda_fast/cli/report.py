"""The command `report`."""

from pathlib import Path
from typing import Annotated

import typer

from sda_fast.cli.app import Json, app, say


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="Folder of a run, demo or evaluation, or a JSON file of rows.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write [report.html beside the results].")
    ] = None,
    rows: Annotated[
        list[Path] | None, typer.Option(help="JSON file of more rows, such as other methods'; repeatable.")
    ] = None,
    grad_cam: Annotated[bool, typer.Option(help="With Grad-CAM panels, which need the extra report.")] = True,
    as_json: Json = False,
) -> None:
    """Write the results of a run as one self-contained HTML page: tables, bars, images, Grad-CAM, settings."""
    from sda_fast.report.run import report_results

    page, lacking = report_results(results, output, rows or (), grad_cam=grad_cam)
    say({"report": str(page), "lacking": lacking}, as_json, "\n".join([f"{page} is written.", *lacking]))
