"""The studies: `compare`, every method under every stream, and `ablate`, what each part of SDA is worth."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sda_fast.cli.app import Json, app, say
from sda_fast.cli.commands import _announce, _check_device, _listing, _options
from sda_fast.errors import SdaError

if TYPE_CHECKING:
    from sda_fast.studies.compare import Result
    from sda_fast.studies.config import StudyConfig

Config = Annotated[Path | None, typer.Argument(help="TOML file of a run, with or without a table of the study.")]
Preset = Annotated[str | None, typer.Option(help="photos: the photographs testbed instead of a file.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write [the file's].")]
PerClass = Annotated[int | None, typer.Option(help="photos: test patches of every class and corruption [1].")]
Corruption = Annotated[list[str] | None, typer.Option(help="photos: one of the fifteen [all]; repeatable.")]
Synthetic = Annotated[int | None, typer.Option(help="photos: synthetic images of every class [100].")]
Workers = Annotated[int | None, typer.Option(help="Processes that share the work [the file's, or 1].")]
Device = Annotated[str | None, typer.Option(help='Torch device, such as "cpu" or "cuda" [the file\'s, or cpu].')]


@app.command()
def compare(
    config: Config = None,
    preset: Preset = None,
    output: Output = None,
    per_class: PerClass = None,
    corruption: Corruption = None,
    synthetic: Synthetic = None,
    method: Annotated[list[str] | None, typer.Option(help="Method to compare [all]; repeatable.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="METHOD.NAME=VALUE, such as memo.views=16; repeatable.")
    ] = None,
    finetuned: Annotated[
        list[str] | None, typer.Option(help="CLASSIFIER=FILE, fine-tuned already; repeatable.")
    ] = None,
    workers: Workers = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compare methods on every classifier, corruption and order of the stream. The same call goes on."""
    from sda_fast.studies.compare import compare as study

    settings = _settings("compare", config, preset, output, per_class, corruption, synthetic, workers, device)
    options = dict(settings.compare.options)
    for name, values in _options(option or []).items():
        options[name] = {**options.get(name, {}), **values}
    chosen = replace(settings.compare, methods=tuple(method or settings.compare.methods), options=options)
    models = {**settings.finetuned, **dict(map(_named_file, finetuned or []))}
    settings = replace(settings, finetuned=models, compare=chosen)
    _say(study(settings, log=_announce), settings, as_json)


@app.command()
def ablate(
    config: Config = None,
    preset: Preset = None,
    output: Output = None,
    per_class: PerClass = None,
    corruption: Corruption = None,
    synthetic: Synthetic = None,
    number: Annotated[
        list[int] | None, typer.Option(help="Fewer images per class, for table 5 [1, 10]; repeatable.")
    ] = None,
    cfg_scale: Annotated[list[float] | None, typer.Option(help="Guidance, for table 6 [1.5, 4.0]; repeatable.")] = None,
    cfg_per_class: Annotated[int | None, typer.Option(help="Images per class for table 6 [as for the rest].")] = None,
    workers: Workers = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Score SDA without or with other parts: components, number of images, guidance. The same call goes on."""
    from sda_fast.studies.ablate import ablate as study

    settings = _settings("ablate", config, preset, output, per_class, corruption, synthetic, workers, device)
    given: dict[str, Any] = {"per_class": number and tuple(number), "cfg_scales": cfg_scale and tuple(cfg_scale)}
    chosen = {name: value for name, value in {**given, "cfg_per_class": cfg_per_class}.items() if value}
    settings = replace(settings, ablate=replace(settings.ablate, **chosen))
    _say(study(settings, log=_announce), settings, as_json)


def _settings(
    study: str,
    config: Path | None,
    preset: str | None,
    output: Path | None,
    per_class: int | None,
    corruptions: list[str] | None,
    synthetic: int | None,
    workers: int | None,
    device: str | None,
) -> "StudyConfig":
    """What the file or the testbed says, changed by what is given; the testbed's patches are written."""
    from sda_fast.studies.config import photos_study, read_study

    if (config is None) == (preset is None):
        raise SdaError(f"{study} takes either a TOML file or --preset photos: give one of them")
    if preset is not None:
        from sda_fast.data import CORRUPTIONS
        from sda_fast.photos.testbed import write_testbed

        if preset != "photos":
            raise SdaError(f"--preset {preset} is not known; it is photos, or give a TOML file")
        settings = photos_study(output or Path("runs", "studies"), 100 if synthetic is None else synthetic)
        _announce("test patches")
        patches = 1 if per_class is None else per_class
        write_testbed(settings.target, patches, corruptions or CORRUPTIONS, exactly=True)
    else:
        if per_class is not None or corruptions or synthetic is not None:
            raise SdaError("--per-class, --corruption and --synthetic are for --preset photos: change the file instead")
        settings = read_study(str(config))
    given: dict[str, Any] = {"output": output and str(output), "workers": workers, "device": device}
    settings = replace(settings, **{name: value for name, value in given.items() if value is not None})
    return replace(settings, device=_check_device(settings.device))


def _named_file(item: str) -> tuple[str, str]:
    name, _, path = item.partition("=")
    if not (name and path):
        raise SdaError(f"--finetuned {item} is not of the form CLASSIFIER=FILE")
    return name, path


def _say(result: "Result", settings: "StudyConfig", as_json: bool) -> None:
    from sda_fast.studies.report import write_study

    text, files = write_study(result, settings, command=_command_line())
    say({"rows": result.rows, "files": files}, as_json, text + "\n\n" + _listing(files))


def _command_line() -> str:
    """This command as it was typed."""
    import shlex
    import sys

    return shlex.join(["sda-fast", *(word for word in sys.argv[1:] if word not in ("--json", "--debug"))])
