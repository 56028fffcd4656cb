"""What a study compares: methods around classifiers, and how one is built."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from sda_fast.engines.classifier import EngineClassifier
from sda_fast.errors import SdaError
from sda_fast.methods import create_from, method_class, revisions
from sda_fast.methods.base import Method
from sda_fast.models import Classifier, load_classifier
from sda_fast.stages.manifest import file_sha256, made_with
from sda_fast.stages.networks import load_networks, network_files
from sda_fast.studies.config import StudyConfig
from sda_fast.weights import weights_path


@dataclass(frozen=True)
class Contender:
    """A method around one of the study's classifiers.

    label: the method's name in rows and tables; folder: of its results; finetuned: the fine-tuned model's file, where
    the method takes one. per_image, evaluations: as the method says, the latter of all networks for one image.
    """

    label: str
    folder: str
    method: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    finetuned: Path | None = None
    per_image: bool = True
    evaluations: int = 1


class Loader:
    """Models of a study, each read when it is first asked for."""

    def __init__(self, config: StudyConfig):
        self.config = config
        self.classifier = lru_cache(maxsize=4)(self._classifier)
        self.network = cache(self._network)

    def method(self, contender: Contender) -> Method:
        """A new instance. Raises SdaError for options its class does not take, and for models that do not fit."""
        kind, config, source = method_class(contender.method), self.config, self.source(contender)
        given: dict[str, Any] = {"mode": config.evaluate.mode, "seed": config.compare.seed}
        given |= {name: self.network(name) for name in network_names(config, kind)}
        if kind.finetuned:
            # Before there is a fine-tuned model, the source takes its place: all else can be checked.
            given["finetuned"] = self.classifier(contender.finetuned) if contender.finetuned else source
            if given["finetuned"].classes != source.classes:
                raise SdaError(f"{contender.finetuned} has other classes than {contender.model}: fine-tune that one")
            given["finetuned"] = self._on_engine(given["finetuned"], contender)
        return create_from(contender.method, self._on_engine(source, contender), given, contender.options)

    def source(self, contender: Contender) -> Classifier:
        """The classifier as it came."""
        return self.classifier(weights_path(self.config.classifiers[contender.model]))

    def _on_engine(self, classifier: Classifier, contender: Contender) -> nn.Module:
        if not engine_settings(self.config, contender):
            return classifier
        chosen, batch_size = self.config.evaluate, images_at_once(self.config, contender)
        return EngineClassifier(classifier, classifier.input_size, chosen.engine, chosen.precision, batch_size)

    def _classifier(self, path: Path) -> Classifier:
        return load_classifier(path).to(self.config.device)

    def _network(self, name: str) -> nn.Module:
        return load_networks(network_paths(self.config, [name]), presets(self.config), self.config.device)[name]


def examined(config: StudyConfig, contenders: Iterable[Contender]) -> list[Contender]:
    """The contenders with what their methods say of themselves. Raises SdaError for those that cannot be built."""
    loader, results = Loader(config), []
    for contender in contenders:
        tta = loader.method(contender)
        results.append(replace(contender, per_image=tta.per_image, evaluations=sum(tta.cost())))
    return results


def recorded(config: StudyConfig, contender: Contender, projections: Mapping[str, Path]) -> dict[str, Any]:
    """Everything that changes a contender's results; it stands in the manifest."""
    kind, evaluate = method_class(contender.method), config.evaluate
    networks = network_paths(config, network_names(config, kind))
    folder = projections[kind.projection] if kind.projection else None
    weights = {"model": _sha256(weights_path(config.classifiers[contender.model]))}
    if kind.finetuned and contender.finetuned:
        weights["finetuned"] = _sha256(contender.finetuned)
    settings: dict[str, Any] = {
        "method": contender.method,
        "options": dict(contender.options),
        "revisions": revisions([contender.method]),
        "input": str(Path(config.target).resolve()),
        "input_made_with": made_with(config.target),
        "projection": folder and str(folder.resolve()),
        "projection_made_with": folder and made_with(folder),
        "networks": {name: _sha256(path) for name, path in networks.items()},
        "seed": config.compare.seed,
        "decoder": evaluate.decoder,
        "resize": evaluate.resize,
        "weights": weights,
    }
    if kind.ensemble:
        settings["mode"] = evaluate.mode
    if contender.per_image:
        settings["batch_size"] = images_at_once(config, contender)
    return settings | engine_settings(config, contender)


def engine_settings(config: StudyConfig, contender: Contender) -> dict[str, str]:
    """Engine and precision of the classifier, where they are not the defaults and the method does not differentiate."""
    chosen = {"engine": config.evaluate.engine, "precision": config.evaluate.precision}
    plain = chosen == {"engine": "eager", "precision": "fp32"}
    return {} if plain or method_class(contender.method).differentiates else chosen


def options_of(config: StudyConfig, method: str) -> dict[str, Any]:
    """A method's options: those of the run's evaluation, and over them those of the comparison."""
    return {**config.evaluate.options.get(method, {}), **config.compare.options.get(method, {})}


def images_at_once(config: StudyConfig, contender: Contender) -> int:
    """How many images a per-image method is given; one that takes its time, one by one, so that little can be lost."""
    return 1 if method_class(contender.method).on_request else config.evaluate.batch_size


def network_names(config: StudyConfig, kind: type[Method]) -> list[str]:
    """The diffusion models that a method takes."""
    return [*kind.needs, *(["vae"] if "dit" in kind.needs and config.vae else [])]


def network_paths(config: StudyConfig, names: Iterable[str]) -> dict[str, Path]:
    """The files of diffusion models by name. Raises SdaError for missing ones."""
    files = {"adm": config.adm, "dit": config.dit, "vae": config.vae}
    return network_files({name: files[name] or "" for name in names}, {})


def presets(config: StudyConfig) -> dict[str, str]:
    named = {"adm": config.adm_preset, "dit": config.dit_preset}
    return {name: preset for name, preset in named.items() if preset}


_sha256 = cache(file_sha256)
