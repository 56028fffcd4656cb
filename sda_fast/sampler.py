"""Class-conditional sampling from a DiT: the synthetic images of SDA's first stage."""

import math
from collections import deque
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from sda_fast.diffusion import Schedule
from sda_fast.diffusion.samplers import Denoiser, ancestral
from sda_fast.errors import SdaError
from sda_fast.execution import Noise, batches
from sda_fast.models.dit import DiT


class Sampler:
    """Ancestral sampling of labelled images (Peebles & Xie 2023; 250 steps, no clipping).

    cfg_scale: strength of classifier-free guidance; 1.0, SDA's choice, runs the plain conditional model once per
    step, anything else a doubled batch. batch_size: as in `Projector`. clip: clamp x_0 to [-1, 1] at every step,
    which the original does not do on its latents and which suits models of pixels.
    Raises SdaError for settings out of range.
    """

    def __init__(
        self,
        dit: DiT,
        respacing: str = "250",
        cfg_scale: float = 1.0,
        clip: bool = False,
        batch_size: int | None = None,
        seed: int = 0,
    ):
        if not 1.0 <= cfg_scale < math.inf:
            raise SdaError(f"cfg_scale={cfg_scale} is out of range: 1.0 is no guidance, more is stronger")
        if cfg_scale != 1.0 and not dit.y_embedder.dropout:
            raise SdaError("this DiT has no null class, which guidance needs: use cfg_scale=1.0")
        if batch_size is not None and batch_size < 1:
            raise SdaError(f"batch_size={batch_size} is out of range: give at least 1")
        self.dit, self.schedule, self.cfg_scale = dit.eval(), Schedule.linear(respacing), cfg_scale
        self.clip, self.batch_size, self.seed = clip, batch_size, seed

    def __call__(
        self,
        labels: Sequence[int] | Tensor,
        noise: Tensor | None = None,
        seeds: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """One image (or latent) per label: float32 [N, C, S, S], in about [-1, 1] for a model of pixels.

        labels: int64 [N]. seeds: one integer per image, its identity in the noise (default 0, 1, ...); noise: explicit
        [steps + 1, N, C, S, S] instead, [0] the start and [k] that of reverse step k.
        Raises SdaError for labels the model does not have.
        """
        dit = self.dit
        device = dit.pos_embed.device
        labels = torch.as_tensor(labels, device=device)
        integers = not labels.is_floating_point() or not len(labels)
        labels = labels.to(torch.int64)
        if (
            not integers
            or labels.ndim != 1
            or (len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < dit.num_classes)
        ):
            raise SdaError(f"labels must be [N] integers from 0 to {dit.num_classes - 1}")
        blank = torch.empty(len(labels), dit.in_channels, dit.input_size, dit.input_size, device=device)
        source = Noise(blank, self.seed, seeds, noise, len(self.schedule) + 1)
        results = [blank[:0]]
        with torch.no_grad():
            for part in batches(len(labels), self.batch_size):
                y = part.take(labels)
                denoiser, x = self._denoiser(y), source.first(part, part.take(blank))
                steps = ancestral(denoiser, self.schedule, x, partial(source.draw, part), clip=self.clip)
                results.append(deque(steps, maxlen=1).pop()[: part.real])
        return torch.cat(results)

    def _denoiser(self, y: Tensor) -> Denoiser:
        if self.cfg_scale == 1.0:
            return lambda x, t: self.dit(x, t, y)
        both = torch.cat([y, torch.full_like(y, self.dit.num_classes)])

        def guided(x: Tensor, t: Tensor) -> Tensor:
            out = self.dit.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), both, self.cfg_scale)
            return out[: len(x)]

        return guided
