"""The TOML file of `sda-fast run`: every stage's settings in one place, each key checked."""

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from sda_fast.data import Decoder
from sda_fast.engines import Precision
from sda_fast.errors import SdaError
from sda_fast.stages.align import AlignSettings
from sda_fast.stages.synthesize import SynthesizeSettings
from sda_fast.values import checked

STUDIES = ("compare", "ablate", "finetuned")


@dataclass(frozen=True)
class SynthesizeConfig(SynthesizeSettings):
    """Settings of the synthesis, how many images per class it makes, and of which classes.

    classes: a file of class names, or "imagenet", for a DiT that does not name its own. only: the classes to make, by
    default all.
    """

    per_class: int = 50
    classes: str | None = None
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class FinetuneConfig:
    """Arguments of `recipe_for`: recipe "paper", "code" or one of `RECIPES`, and what differs from it."""

    recipe: str = "paper"
    drop_path: float | None = None
    micro_batch: int | None = None
    stop_after: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class EvaluateConfig:
    """methods: in the order of the table; ablation: also fine-tune on images that were not aligned (paper, table 4).

    decoder and resize: how images are read and shown to the classifier, engine and precision: how it runs, all as in
    `evaluate`. options: by method, what its class takes; seed: the key of what is random in a method.
    """

    methods: tuple[str, ...] = ("source", "diffpure", "dda", "sda")
    mode: str = "sum"
    batch_size: int = 64
    decoder: Decoder = "pillow"
    resize: bool = True
    engine: str = "eager"
    precision: Precision = "fp32"
    seed: int = 0
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    ablation: bool = False


@dataclass(frozen=True)
class RunConfig:
    """All of SDA on one target folder.

    output: folder of everything the run makes. target: the images to adapt to, `[<corruption>/[<severity>/]]<class>/`.
    adm, dit: weights, a path or "photos:NAME"; classifiers: weights by the name used in tables. adm_preset and
    dit_preset: for weights that do not say how they are built. vae: for a DiT of latents. Methods that need a diffusion
    model get these.
    """

    output: str
    target: str
    adm: str
    dit: str
    classifiers: dict[str, str]
    adm_preset: str | None = None
    dit_preset: str | None = None
    vae: str | None = None
    device: str = "cpu"
    workers: int = 1
    synthesize: SynthesizeConfig = field(default_factory=SynthesizeConfig)
    align: AlignSettings = field(default_factory=AlignSettings)
    diffpure: AlignSettings = field(default_factory=lambda: AlignSettings(projection="diffpure"))
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def read_config(path: str | Path) -> RunConfig:
    """The settings in a TOML file. Raises SdaError if it is missing, no TOML, or holds a key or value that is wrong.

    The tables of studies may stand in the same file (`sda_fast.studies.config`); a run passes over them.
    """
    values = {name: value for name, value in read_values(path).items() if name not in STUDIES}
    config: RunConfig = build(RunConfig, values, str(path))
    if not config.evaluate.methods:
        raise SdaError(f"{path}: [evaluate] methods is empty: name at least one, or leave it out")
    return config


def read_values(path: str | Path) -> dict[str, Any]:
    """What stands in a TOML file, unchecked. Raises SdaError if it is missing or no TOML."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SdaError(f"{path} cannot be read ({error.strerror}): give the path of a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SdaError(f"{path} is not TOML ({error}): mend it there") from error
    if "diffpure" in values and isinstance(values["diffpure"], dict):
        values["diffpure"].setdefault("projection", "diffpure")
    return values


def build(kind: type[Any], values: Mapping[str, Any], where: str) -> Any:
    """A settings dataclass from plain values; SdaError names the first unknown, missing or mistyped key."""
    hints = get_type_hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind)}
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise SdaError(f"{where}: unknown key {key!r}; {hint}")
        hint_type = hints[key]
        if isinstance(hint_type, type) and dataclasses.is_dataclass(hint_type):
            if not isinstance(value, dict):
                raise SdaError(f"{where}: {key} must be a table of settings, not {value!r}")
            arguments[key] = build(hint_type, value, f"{where}, [{key}]")
        else:
            arguments[key] = checked(key, value, hint_type, where)
    missing = [
        name
        for name, f in known.items()
        if name not in arguments and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise SdaError(f"{where}: key {missing[0]!r} is missing; add it")
    return kind(**arguments)
