"""Weights in and out: safetensors, and pickled state dicts read without running what they may carry."""

import argparse
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sda_fast.errors import SdaError
from sda_fast.files import write_bytes
from sda_fast.models.adm import ADM
from sda_fast.models.classifiers import Classifier, classes_of, create_classifier, pretrained_classifier
from sda_fast.models.convert import (
    ARCHITECTURES,
    State,
    architecture_of,
    classifier_head,
    dit_config_from_diffusers,
    dit_from_diffusers,
    looks_like,
    timm_from_mm,
)
from sda_fast.models.dit import DiT, sincos_position_embedding
from sda_fast.models.presets import ADM_PRESETS, ADM_SCHEDULES, DIT_PRESETS
from sda_fast.weights import diffusers_file

# What a model that cannot be built raises: the description comes from a file.
_UNBUILDABLE = (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError)


def save_checkpoint(
    path: str | Path, module: nn.Module, metadata: Mapping[str, Any], dtype: torch.dtype | None = None
) -> Path:
    """Write a state dict as safetensors, whole or not at all; floating tensors are cast to `dtype` where given.

    `metadata` must be JSON-able; `load_*` read `kind` and `config` from it.
    """
    path = Path(path)
    state = {
        name: (t.to(dtype) if dtype and t.is_floating_point() else t).contiguous()
        for name, t in module.state_dict().items()
    }
    write_bytes(save(state, metadata={"sda_fast": json.dumps(dict(metadata))}), path)
    return path


def read_checkpoint(path: str | Path) -> tuple[State, dict[str, Any]]:
    """State dict and metadata of a .safetensors or .pt/.pth/.ckpt/.bin file; a pickle may hold data only.

    Metadata are those of this package's files, else empty. Of a training checkpoint, the averaged weights ("ema")
    are taken where it has them. Tensors of a .pt file are mapped, not copied: they are read when they are used.
    Raises SdaError if the file is missing, damaged, of another format or would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise SdaError(f"checkpoint {path} does not exist; give the path of a .safetensors or .pt file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix not in (".pt", ".pth", ".ckpt", ".bin"):
        raise SdaError(f"checkpoint {path} has suffix {path.suffix!r}; known are .safetensors, .pt, .pth, .ckpt, .bin")
    state = _unpickle(path)
    for wrapper in ("ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise SdaError(f"checkpoint {path} holds no state dict; give a file that maps names to tensors")
    return dict(state), {}


def _read_safetensors(path: Path) -> tuple[State, dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get("sda_fast", "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise SdaError(f"checkpoint {path} is damaged or not safetensors ({error}); fetch it again") from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get("config", {}), dict):
        raise SdaError(f"checkpoint {path} has metadata of another form than this package's; write it again")
    return state, metadata


class _Ignored:
    """Stands for what mmengine puts beside the weights to log with; does nothing with what it is given."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# Harmless types that published and training checkpoints hold beside their tensors: numpy's arrays and numbers (mmcls),
# command-line arguments (DiT), and mmengine's logs, whose two globals never reach what they name.
_RECONSTRUCT, _SCALAR = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "float32", "float64")),
    *((_RECONSTRUCT, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    (_Ignored, "mmengine.logging.history_buffer.HistoryBuffer"),
    *((_Ignored, f"{builtins}.getattr") for builtins in ("builtins", "__builtin__")),
]


def _unpickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle raises nearly anything: IndexError, KeyError, struct.error, ...
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        named = [line for line in lines if "nsupported" in line]  # what torch refused stands below its advice
        reason = (named or lines or [type(error).__name__])[0][:160]
        raise SdaError(
            f"checkpoint {path} is damaged or holds more than tensors ({reason}); fetch it again, or save its "
            "state dict alone where you trust it (docs/checkpoints.md says how)"
        ) from error


def fill(
    module: nn.Module, state: State, path: str | Path, expected: str, found: str, way_out: str = "give the right file"
) -> None:
    """Put a state dict into a module, which may be on the meta device.

    Raises SdaError if keys or shapes do not fit, with the first that does not; `expected` and `found` name the models.
    """
    own = module.state_dict()
    missing, foreign = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if missing or foreign or shapes:
        k = min(shapes) if shapes else ""
        problem = (
            f"{k} has shape {list(state[k].shape)} instead of {list(own[k].shape)}"
            if shapes
            else f"{missing[0]} is missing"
            if missing
            else f"{foreign[0]} is not one of its keys"
        )
        raise SdaError(
            f"checkpoint {path} is not {expected} ({problem}; {len(missing)} missing, {len(foreign)} foreign, "
            f"{len(shapes)} of another shape; it looks like {found}): {way_out}"
        )
    # Assigned, not copied: a model of gigabytes is never in memory twice.
    module.load_state_dict({name: t.to(own[name].dtype).contiguous() for name, t in state.items()}, assign=True)


_Diffusion = TypeVar("_Diffusion", ADM, DiT)


def _build(kind: type[_Diffusion], config: Mapping[str, Any], path: str | Path) -> _Diffusion:
    try:
        with torch.device("meta"):
            model = kind(**config)
    except _UNBUILDABLE as error:
        raise SdaError(f"checkpoint {path} describes a model that this version cannot build ({error})") from error
    model.config = dict(config)
    return model


def _fitting(kind: type[_Diffusion], state: State, presets: Mapping[str, dict[str, Any]]) -> list[str]:
    """The presets whose keys and shapes are those of the state dict."""
    shapes = {name: tensor.shape for name, tensor in state.items()}
    fitting = []
    for name, config in presets.items():
        with torch.device("meta"):
            built = kind(**config).state_dict()
        if shapes == {key: tensor.shape for key, tensor in built.items()}:
            fitting.append(name)
    return fitting


def _load_diffusion(
    path: str | Path, kind: type[_Diffusion], preset: str | None, presets: dict[str, dict[str, Any]]
) -> _Diffusion:
    name = kind.__name__
    if preset is not None and preset not in presets:
        raise SdaError(f"unknown {name} preset {preset!r}; known are {', '.join(presets)}")
    state, metadata = read_checkpoint(path)
    if preset is not None:
        config = presets[preset]
    elif metadata.get("kind") == name.lower():
        config = metadata.get("config", {})
    else:
        fitting = _fitting(kind, state, presets)
        hint = f"{' or '.join(fitting)} fits" if fitting else f"one of {', '.join(presets)}"
        raise SdaError(
            f"checkpoint {path} does not say how its {name} is built (it looks like {looks_like(state)}): "
            f"name a preset, {hint}"
        )
    model = _build(kind, config, path)
    fill(model, state, path, f"this {name}", looks_like(state), "give the right file or another preset")
    if isinstance(model, DiT):
        model.classes = tuple(metadata.get("classes", ()))
    return model.float().eval().requires_grad_(False)


@torch.inference_mode(False)  # weights that a guidance or an adaptation can go back through
def load_adm(path: str | Path, preset: str | None = None, *, schedule: str = "linear") -> ADM:
    """An ADM in float32, frozen, in eval mode. `preset` names a published model; files of this package know theirs.

    schedule: the noise schedule the model will be used with. Raises SdaError for a missing, damaged or foreign file,
    saying which keys or shapes do not fit, and for a preset that was trained on another schedule.
    """
    if (trained := ADM_SCHEDULES.get(preset or "", "linear")) != schedule and preset in ADM_PRESETS:
        raise SdaError(
            f"preset {preset} was trained on the {trained} schedule, not the {schedule} one that projections step "
            "along: choose another model"
        )
    return _load_diffusion(path, ADM, preset, ADM_PRESETS)


@torch.inference_mode(False)
def load_dit(path: str | Path, preset: str | None = None) -> DiT:
    """A DiT in float32, frozen, in eval mode; its `classes` are set where the file names them. Errors as `load_adm`.

    Takes diffusers' DiTTransformer2DModel too: the folder, or its weights with config.json beside them; `preset` is
    not needed then. Timesteps are embedded as DiT's authors do, which diffusers does not (docs/checkpoints.md).
    """
    path = diffusers_file(path, "transformer") if Path(path).is_dir() else Path(path)
    described = path.with_name("config.json")
    if preset is None and path.stem.startswith("diffusion_pytorch_model") and described.is_file():
        return _load_diffusers_dit(path, described)
    return _load_diffusion(path, DiT, preset, DIT_PRESETS)


def read_config(path: Path, expected: str) -> dict[str, Any]:
    """A config.json of diffusers, which names its class. Raises SdaError if it is damaged or of another class."""
    try:
        config = json.loads(path.read_bytes())
        found = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SdaError(f"{path} does not describe a diffusers model ({error}): fetch it again") from error
    # Transformer2DModel is what diffusers called its DiT before 0.29.
    if found != expected and (found, expected) != ("Transformer2DModel", "DiTTransformer2DModel"):
        raise SdaError(f"{path} describes a {found} instead of a {expected}: give the right folder")
    return config


def _load_diffusers_dit(path: Path, described: Path) -> DiT:
    file_config = read_config(described, "DiTTransformer2DModel")
    state, _ = read_checkpoint(path)
    found = looks_like(state)
    try:
        config = dit_config_from_diffusers(file_config)
        state = dit_from_diffusers(state, config["depth"])
    except (ValueError, KeyError, TypeError) as error:
        raise SdaError(f"checkpoint {path} cannot be converted to a DiT ({error})") from error
    model = _build(DiT, config, path)
    state["pos_embed"] = sincos_position_embedding(config["hidden_size"], config["input_size"] // config["patch_size"])
    fill(model, state, path, "the DiT of its config.json", found)
    return model.float().eval().requires_grad_(False)


@torch.inference_mode(False)
def load_classifier(
    path: str | Path,
    architecture: str | None = None,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Classifier:
    """A classifier in float32, frozen, in eval mode.

    path: a file of this package, which says all about itself; a state dict of timm, torchvision, mmpretrain or mmcls;
    or "timm:NAME" for the weights that timm publishes. `architecture` is timm's name; without it, the paper's
    ResNet-50, Swin-T/B and ConvNeXt-T/B are recognised. `classes` names the outputs in order; without it, a thousand
    of them are ImageNet's, by their WordNet identities. Foreign classifiers see images as the paper's evaluation
    shows them: the short side scaled to 256, the centre of 224; normalised by `mean` and `std`, which a state dict does
    not name, by default those of timm's own weights of that architecture. Raises SdaError for a missing, damaged or
    foreign file, saying which keys or shapes do not fit.
    """
    if str(path).startswith("timm:"):
        if mean is not None or std is not None:
            raise SdaError(f"{path} says itself how images are normalised: leave mean and std out")
        return pretrained_classifier(str(path).removeprefix("timm:"), classes).eval().requires_grad_(False)
    state, metadata = read_checkpoint(path)
    if metadata.get("kind") != "classifier":
        return _load_foreign_classifier(state, path, architecture, classes, mean, std)
    if (architecture, classes, mean, std) != (None, None, None, None):
        raise SdaError(f"checkpoint {path} says itself what it holds: leave architecture, classes, mean and std out")
    try:
        classifier = create_classifier(**metadata.get("config", {}))
    except _UNBUILDABLE as error:
        raise SdaError(f"checkpoint {path} describes a model that this version cannot build ({error})") from error
    fill(classifier, state, path, f"this {classifier.config['architecture']}", looks_like(state))
    return classifier.eval().requires_grad_(False)


def _load_foreign_classifier(
    state: State,
    path: str | Path,
    architecture: str | None,
    classes: Sequence[str] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Classifier:
    found = looks_like(state)
    converted = timm_from_mm(state)
    architecture = architecture or architecture_of(converted)
    head = classifier_head(converted)
    if architecture is None or head is None:
        raise SdaError(
            f"checkpoint {path} does not say which timm model it holds (it looks like {found}): give a classifier file "
            f"written by sda-fast, one of {', '.join(ARCHITECTURES)}, or name its architecture"
        )
    names = classes_of(len(head), classes, path)
    classifier = create_classifier(architecture, names, input_size=224, resize=256, mean=mean, std=std)
    fill(classifier.model, converted, path, f"a {architecture} of timm", found, "give the right file or architecture")
    return classifier.float().eval().requires_grad_(False)
