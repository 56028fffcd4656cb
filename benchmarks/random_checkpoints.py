"""Checkpoints of the published formats and sizes with random weights, to try the whole pipeline without a download.

Writes 256x256_diffusion_uncond.pt (ADM, 2.2 GB), DiT-XL-2-256x256.pt (2.7 GB), sd-vae-ft-ema/ (diffusers' folder,
0.3 GB) and resnet50.pth (0.1 GB), each whole or not at all; what is there already stays. docs/reproduce.md has the
commands that use them. Needs the extra: "sda-fast[vae]".

    python benchmarks/random_checkpoints.py FOLDER
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch

from sda_fast.bench.models import architecture, random_model

ADM, DIT, VAE, RESNET = "256x256_diffusion_uncond.pt", "DiT-XL-2-256x256.pt", "sd-vae-ft-ema", "resnet50.pth"

# diffusers' defaults are those of a toy; these are the published autoencoder's.
VAE_CONFIG = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
    "scaling_factor": 0.18215,
}


def write(folder: Path) -> None:
    """All four, one model in memory at a time."""
    write_diffusion_model(folder / ADM, "adm-256-uncond")
    write_diffusion_model(folder / DIT, "dit-xl-2-256")
    write_vae(folder / VAE, VAE_CONFIG)
    write_resnet(folder / RESNET)


def write_diffusion_model(path: Path, preset: str) -> None:
    write_once(path, lambda part: torch.save(random_model(*architecture(preset)).state_dict(), part))


def write_vae(path: Path, config: Mapping[str, Any]) -> None:
    """A folder as diffusers' own AutoencoderKL writes it. Raises ImportError without diffusers."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    write_once(path, lambda part: AutoencoderKL(**config).save_pretrained(part))


def write_resnet(path: Path) -> None:
    torch.manual_seed(0)
    write_once(path, lambda part: torch.save(timm.create_model("resnet50").state_dict(), part))


def write_once(path: Path, write: Callable[[Path], Any]) -> None:
    """Have a file or folder written, under another name until it is whole; not if it is there."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"part-{path.name}")
    write(part)
    part.rename(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)
