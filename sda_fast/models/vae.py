"""The autoencoder of latent diffusion, from diffusers: what turns a DiT's latents into images."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sda_fast.errors import SdaError
from sda_fast.models.checkpoints import fill, read_checkpoint, read_config
from sda_fast.models.convert import looks_like, vae_with_current_keys
from sda_fast.numerics import plain_float32
from sda_fast.weights import diffusers_file


class VAE(nn.Module):
    """An AutoencoderKL of diffusers; `scale` is the factor its latents are multiplied with (0.18215 for DiT's)."""

    def __init__(self, autoencoder: Any):
        super().__init__()
        self.autoencoder = autoencoder
        self.scale = float(autoencoder.config.scaling_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """latents float [N, C, h, w], as the diffusion model makes them -> images [N, 3, 8h, 8w] in [-1, 1].

        8 is the reduction of Stability's autoencoders; others have their own. Images are decoded one by one: the
        decoder's memory is what limits the batch, and an image then does not depend on its neighbours.
        """
        with plain_float32(latents.device):
            images = [self.autoencoder.decode(z[None] / self.scale).sample for z in latents]
        return torch.cat(images).clamp(-1, 1) if images else latents.new_empty(0, 3, *self._sides(latents))

    def encode(self, images: Tensor) -> Tensor:
        """images float [N, 3, 8h, 8w] in [-1, 1] -> the means of their latents [N, C, h, w], as the DiT takes them."""
        with plain_float32(images.device):
            return self.autoencoder.encode(images).latent_dist.mean * self.scale

    @property
    def reduction(self) -> int:
        """Pixels of an image in a pixel of its latents, along a side."""
        return 2 ** (len(self.autoencoder.config.block_out_channels) - 1)

    def _sides(self, latents: Tensor) -> tuple[int, int]:
        return latents.shape[-2] * self.reduction, latents.shape[-1] * self.reduction


def vae_file(path: str | Path) -> Path:
    """The weights file in a folder that diffusers wrote, or the file itself. Raises SdaError for a foreign folder."""
    return Path(diffusers_file(path, "vae")) if Path(path).is_dir() else Path(path)


@torch.inference_mode(False)
def load_vae(path: str | Path) -> VAE:
    """The VAE in a folder that diffusers wrote (its own, a pipeline's, or its weights file), in float32, frozen.

    Raises SdaError without diffusers, and for a missing, damaged or foreign file.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise SdaError('decoding latents needs diffusers: pip install "sda-fast[vae]"') from error
    path = vae_file(path)
    state, _ = read_checkpoint(path)
    config = read_config(path.with_name("config.json"), "AutoencoderKL")
    try:
        with torch.device("meta"):
            autoencoder = AutoencoderKL.from_config(config)
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:
        raise SdaError(f"{path.with_name('config.json')} cannot be built by diffusers ({error})") from error
    fill(autoencoder, vae_with_current_keys(state), path, "the VAE of its config.json", looks_like(state))
    return VAE(autoencoder.float().eval().requires_grad_(False))
