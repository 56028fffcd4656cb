"""Weights in and out: safetensors, and pickled state dicts read without running what they may carry."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sda_fast.errors import SdaError
from sda_fast.files import write_bytes
from sda_fast.models.adm import ADM
from sda_fast.models.classifiers import Classifier, create_classifier
from sda_fast.models.dit import DiT

_ADM_256 = {
    "image_size": 256,
    "model_channels": 256,
    "out_channels": 6,
    "num_res_blocks": 2,
    "attention_resolutions": (8, 16, 32),
    "channel_mult": (1, 1, 2, 2, 4, 4),
    "num_head_channels": 64,
}
# The published models of guided-diffusion (its README gives the flags).
ADM_PRESETS: dict[str, dict[str, Any]] = {
    "imagenet64_cond": {
        **_ADM_256,
        "image_size": 64,
        "model_channels": 192,
        "num_res_blocks": 3,
        "attention_resolutions": (2, 4, 8),
        "channel_mult": (1, 2, 3, 4),
        "num_classes": 1000,
        "dropout": 0.1,
        "use_new_attention_order": True,
    },
    "imagenet128_cond": {
        **_ADM_256,
        "image_size": 128,
        "attention_resolutions": (4, 8, 16),
        "channel_mult": (1, 1, 2, 3, 4),
        "num_heads": 4,
        "num_head_channels": -1,
        "num_classes": 1000,
    },
    "imagenet256": _ADM_256,
    "imagenet256_cond": {**_ADM_256, "num_classes": 1000},
    "imagenet512_cond": {
        **_ADM_256,
        "image_size": 512,
        "attention_resolutions": (16, 32, 64),
        "channel_mult": (0.5, 1, 1, 2, 2, 4, 4),
        "num_classes": 1000,
    },
}
DIT_PRESETS: dict[str, dict[str, Any]] = {
    f"dit-{name.lower()}-{patch}": {
        "patch_size": patch,
        "hidden_size": hidden,
        "depth": depth,
        "num_heads": heads,
    }
    for name, hidden, depth, heads in (
        ("S", 384, 12, 6),
        ("B", 768, 12, 12),
        ("L", 1024, 24, 16),
        ("XL", 1152, 28, 16),
    )
    for patch in (2, 4, 8)
}


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


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and metadata of a .safetensors or .pt/.pth file; a pickle may hold tensors only.

    Raises SdaError if the file is missing, damaged, of another format or would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise SdaError(f"checkpoint {path} does not exist; give the path of a .safetensors or .pt file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                metadata = json.loads((file.metadata() or {}).get("sda_fast", "{}"))
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, json.JSONDecodeError) as error:
            raise SdaError(f"checkpoint {path} is damaged or not safetensors ({error}); fetch it again") from error
        if not isinstance(metadata, dict) or not isinstance(metadata.get("config", {}), dict):
            raise SdaError(f"checkpoint {path} has metadata of another form than this package's; write it again")
        return state, metadata
    if path.suffix not in (".pt", ".pth", ".ckpt"):
        raise SdaError(f"checkpoint {path} has suffix {path.suffix!r}; known are .safetensors, .pt, .pth and .ckpt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises nearly anything: IndexError, KeyError, struct.error, ...
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise SdaError(f"checkpoint {path} is damaged or holds more than tensors ({reason}); fetch it again") from error
    for wrapper in ("state_dict", "model", "ema"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise SdaError(f"checkpoint {path} holds no state dict; give a file that maps names to tensors")
    return state, {}


def _looks_like(state: Mapping[str, Tensor]) -> str:
    if "input_blocks.0.0.weight" in state:
        return "an ADM"
    if "x_embedder.proj.weight" in state:
        return "a DiT"
    return "a classifier" if any(name.startswith(("model.", "fc.", "head.", "stem")) for name in state) else "neither"


def _fill(module: nn.Module, state: Mapping[str, Tensor], path: str | Path, expected: str) -> None:
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
            f"{len(shapes)} of another shape; it looks like {_looks_like(state)}): "
            "give the right file or another preset"
        )
    module.load_state_dict({name: t.to(own[name].dtype) for name, t in state.items()})


_Diffusion = TypeVar("_Diffusion", ADM, DiT)


def _load_diffusion(
    path: str | Path, kind: type[_Diffusion], preset: str | None, presets: dict[str, Any]
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
        raise SdaError(
            f"checkpoint {path} does not say how its {name} is built (it looks like {_looks_like(state)}): "
            f"name a preset, one of {', '.join(presets)}"
        )
    try:
        with torch.device("meta"):
            model = kind(**config)
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:
        raise SdaError(f"checkpoint {path} describes a model that this version cannot build ({error})") from error
    model.to_empty(device="cpu")
    _fill(model, state, path, f"this {name}")
    model.config = dict(config)
    if isinstance(model, DiT):
        model.classes = tuple(metadata.get("classes", ()))
    return model.float().eval().requires_grad_(False)


def load_adm(path: str | Path, preset: str | None = None) -> ADM:
    """An ADM in float32, frozen, in eval mode. `preset` names a published model; files of this package know theirs.

    Raises SdaError for a missing, damaged or foreign file, saying which keys or shapes do not fit.
    """
    return _load_diffusion(path, ADM, preset, ADM_PRESETS)


def load_dit(path: str | Path, preset: str | None = None) -> DiT:
    """A DiT in float32, frozen, in eval mode; its `classes` are set where the file names them. Errors as `load_adm`."""
    return _load_diffusion(path, DiT, preset, DIT_PRESETS)


def load_classifier(path: str | Path) -> Classifier:
    """A classifier of this package's format (timm architecture, options and classes in the metadata), in eval mode."""
    state, metadata = read_checkpoint(path)
    if metadata.get("kind") != "classifier":
        raise SdaError(
            f"checkpoint {path} does not say which timm model it holds (it looks like {_looks_like(state)}): "
            "give a classifier file written by sda-fast"
        )
    try:
        classifier = create_classifier(**metadata.get("config", {}))
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:
        raise SdaError(f"checkpoint {path} describes a model that this version cannot build ({error})") from error
    _fill(classifier, state, path, f"this {classifier.config['architecture']}")
    return classifier.eval().requires_grad_(False)
