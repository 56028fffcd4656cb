"""Noising and the order of the reverse steps, in the notation of Ho et al. 2020 and Dhariwal & Nichol 2021.

A step is `sda_fast.ops.reverse_step`, of which `sda_fast.diffusion.guidance` makes a guided one. A network's output
is [N, C, H, W] (noise) or [N, 2C, H, W] (noise, then the interpolation v of the learned variance).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sda_fast.diffusion.schedule import Schedule

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x [N, C, H, W], timesteps int64 [N]) -> network output
# What `reverse_step` draws from: {"noise": standard normal [N, C, H, W]} or {"seed": ..., "identities": ...}.
Draw = dict[str, Any]


class ReverseSteps:
    """The last `start` (default: all) reverse steps of a schedule, laid out on a device.

    Nothing of a step is a number on the host, so that no step waits for the device and one captured graph serves all.
    table: `Schedule.step_table`. Iterating yields `position`, int64 [2], once per step: its index into the table,
    start - 1 first and 0 last, and its number, 1, 2, ..., which counts the noise.
    """

    def __init__(self, schedule: Schedule, start: int | None = None, device: torch.device | str = "cpu"):
        start = len(schedule) if start is None else start
        number = torch.arange(1, start + 1)
        self.table = schedule.step_table(device)
        self._timestep_map = schedule.timestep_map.to(device)
        self._positions = torch.stack((start - number, number), 1).to(device)

    def __len__(self) -> int:
        return len(self._positions)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._positions)

    def timesteps(self, position: Tensor, x: Tensor) -> Tensor:
        """What the network is told at a step: int64 [N] for x [N, ...]."""
        return self._timestep_map.index_select(0, position[:1]).expand(len(x))


def q_sample(schedule: Schedule, i: int, x0: Tensor, noise: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (Ho et al. 2020, equation 4); all [N, C, H, W]."""
    abar = schedule.alphas_cumprod[i].item()
    return math.sqrt(abar) * x0 + math.sqrt(1 - abar) * noise
