"""Checkpoints of the published formats and sizes with random weights, to try the whole pipeline without a download.

Writes 256x256_diffusion_uncond.pt (ADM, 2.2 GB), DiT-XL-2-256x256.pt (2.7 GB), sd-vae-ft-ema/ (diffusers' folder,
0.3 GB) and resnet50.pth (0.1 GB). docs/reproduce.md has the commands that use them. Needs the extra: "sda-fast[vae]".

    python benchmarks/random_checkpoints.py FOLDER
"""

import argparse
from pathlib import Path

import timm
import torch
from diffusers import AutoencoderKL

from sda_fast.bench.models import architecture, random_model

# diffusers' defaults are those of a toy; these are the published autoencoder's.
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
    "scaling_factor": 0.18215,
}


def write(folder: Path) -> None:
    """The files, one model in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    for preset, name in (("adm-256-uncond", "256x256_diffusion_uncond"), ("dit-xl-2-256", "DiT-XL-2-256x256")):
        torch.save(random_model(*architecture(preset)).state_dict(), folder / f"{name}.pt")
    torch.manual_seed(0)
    AutoencoderKL(**VAE).save_pretrained(folder / "sd-vae-ft-ema")
    torch.save(timm.create_model("resnet50").state_dict(), folder / "resnet50.pth")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)
