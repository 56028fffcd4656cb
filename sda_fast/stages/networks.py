"""The diffusion models that methods ask for: their files, by kind, and how each is read."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from sda_fast.errors import SdaError
from sda_fast.models import load_adm, load_dit, load_vae
from sda_fast.weights import diffusers_file, weights_path

KINDS = ("adm", "dit", "vae")


def network_files(networks: Mapping[str, str | Path], presets: Mapping[str, str]) -> dict[str, Path]:
    """The weights file of each kind of network. Raises SdaError for unknown kinds, missing files and idle presets."""
    for kind in networks:
        if kind not in KINDS:
            raise SdaError(f"--network {kind}= is not known; choose from {', '.join(KINDS)}")
    for kind, name in presets.items():
        if kind not in networks:
            raise SdaError(f"--preset {kind}={name} is of no use without the model: give --network {kind}=FILE")
    return {
        kind: diffusers_file(path, "vae") if kind == "vae" and Path(path).is_dir() else weights_path(path)
        for kind, path in networks.items()
    }


def load_networks(files: Mapping[str, Path], presets: Mapping[str, str], device: str) -> dict[str, nn.Module]:
    """The networks of `network_files`, on a device. Raises SdaError for files that are not what they should be."""
    return {kind: _load(kind, file, presets.get(kind)).to(device) for kind, file in files.items()}


def _load(kind: str, file: Path, preset: str | None) -> nn.Module:
    if kind == "vae":
        return load_vae(file)
    return load_adm(file, preset) if kind == "adm" else load_dit(file, preset)
