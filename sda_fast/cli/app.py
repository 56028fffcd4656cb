"""The typer application, and what happens to errors."""

import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sda_fast import __version__
from sda_fast.errors import SdaError

app = typer.Typer(
    name="sda-fast",
    help="Diffusion-driven test-time adaptation: Synthetic-Domain Alignment and its kin.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

INCOMPLETE = 3
INTERRUPTED = 130
TERMINATED = 143

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sda-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def say(result: Mapping[str, Any], as_json: bool, text: str) -> None:
    """Print a command's result: as one JSON object, or as a sentence."""
    from sda_fast.stages.ranks import is_first

    if is_first():  # of the processes that torchrun started
        typer.echo(json.dumps(result, indent=2) if as_json else text)


def end(*folders: str | Path) -> None:
    """End a command: with exit code 3 and a sentence for each folder whose stage had to leave files out."""
    from sda_fast.stages.failures import read_failures, sentence
    from sda_fast.stages.ranks import is_first

    if not is_first():  # the first process speaks for all
        return
    failed = {folder: failures for folder in folders if (failures := read_failures(folder))}
    for folder, failures in failed.items():
        print(f"sda-fast: {sentence(folder, failures)}.", file=sys.stderr)
    if failed:
        raise typer.Exit(INCOMPLETE)


def run() -> None:
    """Run the application.

    Exit code 2: a user's mistake, in one sentence; 3: files were left out; 130, 143: interrupted (Ctrl-C, SIGTERM).
    """
    import sda_fast.cli.bench
    import sda_fast.cli.checkpoints
    import sda_fast.cli.commands
    import sda_fast.cli.corrupt
    import sda_fast.cli.report
    import sda_fast.cli.studies  # noqa: F401  (all register commands)

    stopped = []

    def stop(*_: object) -> None:
        stopped.append(True)
        raise KeyboardInterrupt

    if "WORLD_SIZE" not in os.environ:  # under torchrun a rank that waits for others must end at once, without Python
        signal.signal(signal.SIGTERM, stop)  # what batch systems send: ended as by Ctrl-C, with nothing left over
    try:
        app(prog_name="sda-fast")  # in its usage too, however it was started
    except SdaError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        text = " ".join(str(error).splitlines())
        print(f"sda-fast: {text if text.endswith(('.', '?')) else text + '.'}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # what typer makes of Ctrl-C, without a word
            print("sda-fast: interrupted; the same command goes on from here.", file=sys.stderr)
            sys.exit(TERMINATED if stopped else INTERRUPTED)
        raise
