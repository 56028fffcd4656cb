"""What a study compares: the TOML file of `sda-fast run` with two more tables, `[compare]` and `[ablate]`."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sda_fast.errors import SdaError
from sda_fast.methods import METHODS, method_class
from sda_fast.photos.demo import demo_config
from sda_fast.stages.config import RunConfig, build, read_values
from sda_fast.studies.streams import RESETS, Stream


@dataclass(frozen=True)
class CompareSettings:
    """methods: in the order of the tables, by default all there are; options: by method, what its class takes.

    The rest says which streams a method that learns from its stream is shown: all combinations, see `Stream`. seed: of
    their order, and of what is random in a method.
    """

    methods: tuple[str, ...] = ()
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    mixed_classes: tuple[bool, ...] = (True, False)
    mixed_corruptions: tuple[bool, ...] = (False, True)
    batch_sizes: tuple[int, ...] = (64, 1)
    resets: tuple[str, ...] = RESETS
    seed: int = 0


@dataclass(frozen=True)
class AblateSettings:
    """per_class: how many synthetic images of every class (paper, table 5), beside `[synthesize] per_class`.

    cfg_scales: classifier-free guidance (table 6), beside `[synthesize] cfg_scale`; cfg_per_class: how many images of
    every class are made for each of them, by default as many as for the rest.
    """

    per_class: tuple[int, ...] = (1, 10)
    cfg_scales: tuple[float, ...] = (1.5, 4.0)
    cfg_per_class: int | None = None


@dataclass(frozen=True)
class StudyConfig(RunConfig):
    """A run's settings and a study's. finetuned: by classifier, a fine-tuned model that exists already; `compare` then
    makes none."""

    finetuned: dict[str, str] = field(default_factory=dict)
    compare: CompareSettings = field(default_factory=CompareSettings)
    ablate: AblateSettings = field(default_factory=AblateSettings)


def read_study(path: str | Path) -> StudyConfig:
    """The settings in a TOML file. Raises SdaError as `read_config` does."""
    return build(StudyConfig, read_values(path), str(path))


def photos_study(output: str | Path, synthetic: int) -> StudyConfig:
    """The demo's settings: the testbed, its two classifiers, `synthetic` images of every class."""
    demo = demo_config(output, synthetic=synthetic, ablation=False)
    return StudyConfig(**{f.name: getattr(demo, f.name) for f in fields(RunConfig)})


def chosen_methods(settings: CompareSettings) -> list[str]:
    """The methods to compare, each once. Raises SdaError for unknown ones, in the options too."""
    methods = list(dict.fromkeys(settings.methods or METHODS))
    for name in (*methods, *settings.options):
        method_class(name)
    return methods


def chosen_streams(settings: CompareSettings) -> list[Stream]:
    """All combinations that make sense. Raises SdaError for settings out of range."""
    for size in settings.batch_sizes:
        if size < 1:
            raise SdaError(f"[compare] batch_sizes = {list(settings.batch_sizes)} is out of range: give at least 1")
    for reset in settings.resets:
        if reset not in RESETS:
            raise SdaError(f"[compare] resets: {reset!r} is not known; choose from {', '.join(RESETS)}")
    streams = [
        Stream(classes, corruptions, size, reset)
        for corruptions in dict.fromkeys(settings.mixed_corruptions)
        for classes in dict.fromkeys(settings.mixed_classes)
        for reset in dict.fromkeys(settings.resets)
        for size in dict.fromkeys(settings.batch_sizes)
        if not (corruptions and reset == "corruption")
    ]
    if not streams:
        raise SdaError("[compare] leaves no stream: name one of each; mixed corruptions cannot be reset per corruption")
    return streams
