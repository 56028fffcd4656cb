"""The command `corrupt`."""

from typing import Annotated

import typer

from sda_fast.cli.app import Json, app, end, say
from sda_fast.cli.commands import Input, Output, Seed, Workers


@app.command()
def corrupt(
    input: Input,
    output: Output,
    corruption: Annotated[
        list[str] | None, typer.Option(help="One of the fifteen, or watermark [the fifteen]; may be repeated.")
    ] = None,
    severity: Annotated[list[int] | None, typer.Option(help="1 to 5 [all]; may be repeated.")] = None,
    size: Annotated[int, typer.Option(help="Side of the central square that is corrupted.")] = 224,
    resize: Annotated[int, typer.Option(help="Short side before that square is cut out.")] = 256,
    jpeg_quality: Annotated[
        int, typer.Option(help="Compression after a corruption (not the watermark), as in ImageNet-C; 0 for none.")
    ] = 85,
    font: Annotated[
        str | None, typer.Option(help="Font file of the watermark [that of the package imagenet-w].")
    ] = None,
    seed: Seed = 0,
    workers: Workers = 1,
    as_json: Json = False,
) -> None:
    """Corrupt one's own images as ImageNet-C and ImageNet-W do; the result is not the official files."""
    from sda_fast.data import CORRUPTIONS
    from sda_fast.stages.corrupt import CorruptSettings, corrupt_folder

    settings = CorruptSettings(size, resize, jpeg_quality or None, seed, font)
    result = corrupt_folder(
        input, output, corruption or CORRUPTIONS, severity or (1, 2, 3, 4, 5), settings, workers=workers
    )
    say(result, as_json, f"{result['images']} images in {output}; not the official files of ImageNet-C or ImageNet-W.")
    end(output)
