"""Class-conditional sampling from a DiT: the synthetic images of SDA's first stage."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sda_fast.diffusion import Schedule
from sda_fast.diffusion.samplers import ReverseSteps
from sda_fast.engines import DiTStep, Engine, Precision
from sda_fast.engines.runner import Runner, halving
from sda_fast.errors import SdaError
from sda_fast.execution import Batch, Noise, batches
from sda_fast.models.dit import DiT
from sda_fast.ops import reverse_step

# Steps whose conditioning is computed at a time, of each class by itself: a matrix product of always the same size, so
# that an image does not depend, not even in last bits, on which classes are beside it.
_STEPS_AT_ONCE = 25


class Sampler:
    """Ancestral sampling of labelled images (Peebles & Xie 2023; 250 steps, no clipping).

    cfg_scale: strength of classifier-free guidance; 1.0, SDA's choice, runs the plain conditional model once per
    step, anything else a doubled batch. engine, precision, batch_size: as in `Projector`. clip: clamp x_0 to [-1, 1] at
    every step, which the original does not do on its latents and which suits models of pixels.
    The dit is put into eval mode and its weights are frozen, here and for good.
    Raises SdaError for settings out of range.
    """

    batch_unit = 1  # what the batch must be a multiple of

    def __init__(
        self,
        dit: DiT,
        respacing: str = "250",
        cfg_scale: float = 1.0,
        clip: bool = False,
        engine: str | Engine = "eager",
        precision: Precision = "fp32",
        batch_size: int | None = None,
        seed: int = 0,
    ):
        if not 1.0 <= cfg_scale < math.inf:
            raise SdaError(f"cfg_scale={cfg_scale} is out of range: 1.0 is no guidance, more is stronger")
        if cfg_scale != 1.0 and not dit.y_embedder.dropout:
            raise SdaError("this DiT has no null class, which guidance needs: use cfg_scale=1.0")
        if batch_size is not None and batch_size < 1:
            raise SdaError(f"batch_size={batch_size} is out of range: give at least 1")
        step = DiTStep(dit, cfg_scale, precision)
        self.network = Runner(step, engine)
        self.dit, self.schedule, self.cfg_scale = dit, Schedule.linear(respacing), cfg_scale
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

        def sample() -> Tensor:
            results = [self._sample(part, labels, blank, source) for part in batches(len(labels), self.batch_size)]
            return torch.cat([blank[:0], *results])

        return halving(self, len(labels), sample)

    @torch.no_grad()
    def _sample(self, part: Batch, labels: Tensor, blank: Tensor, source: Noise) -> Tensor:
        y, x = part.take(labels), source.first(part, part.take(blank))
        steps = ReverseSteps(self.schedule, device=x.device)
        conditioning = _Conditioning(self.dit, self.schedule, y, guided=self.cfg_scale != 1.0)
        for k, position in enumerate(steps, 1):
            (out,) = self.network(x, conditioning(len(steps) - k))
            x = reverse_step(x, out, steps.table, position, clip=self.clip, **source.draw(part, k))
        return x[: part.real]


class _Conditioning:
    """What the DiT is told of every step and class of a batch, each computed once."""

    def __init__(self, dit: DiT, schedule: Schedule, y: Tensor, guided: bool):
        if guided:
            y = torch.stack([y, torch.full_like(y, dit.num_classes)])  # the null class
        self._classes, self._which = y.unique(return_inverse=True)
        self._dit, self._timesteps = dit, schedule.timestep_map.to(y.device)
        self._first, self._rows = len(schedule), torch.empty(0)

    def __call__(self, i: int) -> Tensor:
        """For the schedule's step i, which must come in falling order: what `DiTStep` takes of `DiT.conditioning`."""
        if i < self._first:
            self._first = max(0, i + 1 - _STEPS_AT_ONCE)
            timesteps = self._timesteps[self._first :][:_STEPS_AT_ONCE]
            self._rows = torch.stack(
                [self._dit.conditioning(timesteps, y.expand(len(timesteps))) for y in self._classes]
            )
        return self._rows[:, i - self._first][self._which]  # [classes, steps, K] -> [N, K] or [2, N, K]
