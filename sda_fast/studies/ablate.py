"""The study "ablate": what each part of SDA is worth (paper, tables 4, 5 and 6)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from sda_fast.errors import SdaError
from sda_fast.stages.ranks import alone
from sda_fast.studies.compare import Result, check, result
from sda_fast.studies.config import AblateSettings, StudyConfig
from sda_fast.studies.contenders import Contender, examined
from sda_fast.studies.prepare import Log, finetuned_models, first_of_each_class, project, synthetic_images
from sda_fast.studies.scoring import score

UNALIGNED = "SDA, not aligned"
# Label, method and options of what needs no further fine-tuning. "second" is the prediction on the projection alone.
PARTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Source", "source", {}),
    ("DDA", "dda", {}),
    ("DDA, projection alone", "dda", {"mode": "second"}),
)


def of_number(per_class: int) -> str:
    """The label of SDA with so many synthetic images of every class."""
    return f"SDA, {per_class} per class"


def of_scale(cfg_scale: float, per_class: int) -> str:
    """The label of SDA with images of another classifier-free guidance."""
    return f"SDA, guidance {cfg_scale}, {per_class} per class"


def ablate(config: StudyConfig, *, quiet: bool | None = None, log: Log = lambda line: None) -> Result:
    """Score SDA with parts left out or changed, under `<output>/ablate/`; the same call goes on.

    Fewer images are the first of the larger number, so that nothing is made twice; only another guidance scale asks for
    images of its own. Raises SdaError for settings out of range, and as the stages do.
    """
    alone("ablate")
    check(replace(config, finetuned={}), ["source", "dda", "sda"])  # it fine-tunes by itself
    _check(config)
    contenders = [
        Contender(label, _folder(label), method, model, options)
        for label, method, options in PARTS
        for model in config.classifiers
    ]
    contenders = examined(config, contenders)
    projections = project(config, ["dda"], log, quiet)
    for label, data, name in _data_sets(config, log, quiet):
        models = finetuned_models(config, data, name, log, quiet)
        variants: dict[str, dict[str, Any]] = {label: {}}
        if name == "aligned":
            variants[f"{label}, projection alone"] = {"mode": "second"}
        for variant, options in variants.items():
            contenders += [
                Contender(variant, _folder(variant), "sda", model, options, path) for model, path in models.items()
            ]
    log("ablate")
    return result(config, "ablate", score(config, "ablate", contenders, projections, quiet=quiet), "any")


def cfg_per_class(config: StudyConfig) -> int:
    """How many images of each class table 6 compares."""
    return config.ablate.cfg_per_class or config.synthesize.per_class


def numbers(config: StudyConfig) -> list[int]:
    """The numbers of images of each class beside the largest, ascending."""
    wanted = {*config.ablate.per_class, cfg_per_class(config)} if config.ablate.cfg_scales else config.ablate.per_class
    return sorted({n for n in wanted if n != config.synthesize.per_class})


def scales(config: StudyConfig) -> list[float]:
    """The guidance scales beside that of `[synthesize]`."""
    return [scale for scale in dict.fromkeys(config.ablate.cfg_scales) if scale != config.synthesize.cfg_scale]


def _check(config: StudyConfig) -> None:
    settings: AblateSettings = config.ablate
    most = config.synthesize.per_class
    for n in (*settings.per_class, cfg_per_class(config)):
        if not 1 <= n <= most:
            raise SdaError(f"[ablate] asks for {n} images per class: give 1 to [synthesize] per_class = {most}")


def _data_sets(config: StudyConfig, log: Log, quiet: bool | None) -> list[tuple[str, Path, str]]:
    """Label, folder and name of everything that the classifiers are fine-tuned on."""
    raw, aligned = synthetic_images(config, log, quiet)
    data = [("SDA", aligned, "aligned"), (UNALIGNED, raw, "raw")]
    data += [(of_number(n), first_of_each_class(aligned, n), f"aligned-first-{n}") for n in numbers(config)]
    n = cfg_per_class(config)
    for scale in scales(config):
        _, guided = synthetic_images(config, log, quiet, scale, n)
        data.append((of_scale(scale, n), guided, f"cfg-{scale}-first-{n}"))
    return data


def _folder(label: str) -> str:
    return label.lower().replace(",", "").replace(" ", "-")
