"""Noise schedules: the linear betas of DDPM, and the choice of a subset of their steps ("respacing")."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sda_fast.errors import SdaError


def space_timesteps(steps: int, respacing: str) -> list[int]:
    """The original steps a respacing keeps, ascending.

    "100": a hundred evenly spaced steps, first and last included; "10,15,20": so many from each third;
    "ddim25": the constant integer stride of DDIM (Song et al. 2021) that gives exactly 25.
    """
    try:
        if respacing.startswith("ddim"):
            wanted = int(respacing[4:])
            for hop in range(1, steps):
                if len(range(0, steps, hop)) == wanted:
                    return list(range(0, steps, hop))
            raise SdaError(f"respacing {respacing!r}: no integer stride gives {wanted} of {steps} steps; use {wanted}")
        counts = [int(part) for part in respacing.split(",")]
    except ValueError:
        raise SdaError(f'respacing {respacing!r} is not of the form "100", "10,15,20" or "ddim25"') from None
    chosen: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        size = steps // len(counts) + (i < steps % len(counts))
        if not 1 <= count <= size:
            raise SdaError(f"respacing {respacing!r}: {count} is not between 1 and {size}; ask for fewer steps")
        # Python's round (half to even) of an accumulated stride, which is what the original's steps are made of
        stride = 1.0 if count == 1 else (size - 1) / (count - 1)
        position: float = 0
        for _ in range(count):
            chosen.append(start + round(position))
            position += stride
        start += size
    return chosen


# The columns of `Schedule.step_table`, as csrc/step_table.h and the kernels count them.
STEP_COLUMNS = (
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "log_variance_low",  # of betatilde, clipped
    "log_variance_high",  # of beta
    "noise_scale",  # zero at index 0, where the mean is taken, else one
    "timestep",  # of the original 1000
)


@dataclass(frozen=True, eq=False)
class Schedule:
    """Tables of a diffusion process, float64 [steps], index 0 the least noisy; names as in guided-diffusion.

    `timestep_map` (int64) holds the timestep of the original 1000 that each index tells the network.
    """

    respacing: str
    timestep_map: Tensor
    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor

    @classmethod
    def linear(cls, respacing: str = "1000", steps: int = 1000) -> "Schedule":
        """Betas from 1e-4 to 0.02 (Ho et al. 2020, section 4), scaled to `steps`, then respaced."""
        scale = 1000 / steps
        base = np.cumprod(1.0 - np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64))
        timestep_map = space_timesteps(steps, respacing)
        # The betas of the kept steps are those that leave their alphas_cumprod unchanged.
        kept = base[timestep_map]
        betas = 1.0 - kept / np.append(1.0, kept[:-1])
        alphas_cumprod = np.cumprod(1.0 - betas)
        previous = np.append(1.0, alphas_cumprod[:-1])
        variance = betas * (1.0 - previous) / (1.0 - alphas_cumprod)
        # The variance at index 0 is zero; its logarithm repeats that of index 1.
        clipped = np.append(variance[1] if len(variance) > 1 else variance[0], variance[1:])
        with np.errstate(divide="ignore"):
            tables = {
                "betas": betas,
                "alphas_cumprod": alphas_cumprod,
                "alphas_cumprod_prev": previous,
                "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / alphas_cumprod),
                "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / alphas_cumprod - 1.0),
                "posterior_mean_coef1": betas * np.sqrt(previous) / (1.0 - alphas_cumprod),
                "posterior_mean_coef2": (1.0 - previous) * np.sqrt(1.0 - betas) / (1.0 - alphas_cumprod),
                "posterior_variance": variance,
                "posterior_log_variance_clipped": np.log(clipped),
            }
        return cls(
            respacing=respacing,
            timestep_map=torch.tensor(timestep_map, dtype=torch.int64),
            **{name: torch.from_numpy(table) for name, table in tables.items()},
        )

    def __len__(self) -> int:
        return len(self.timestep_map)

    def step_table(self, device: torch.device | str = "cpu") -> Tensor:
        """All coefficients of a reverse step, float32 [steps, 8], columns as `STEP_COLUMNS`.

        The operators read them on the device by the step's index, so that one captured graph serves every step.
        """
        noise_scale = torch.ones_like(self.betas)
        noise_scale[0] = 0
        columns = (
            self.sqrt_recip_alphas_cumprod,
            self.sqrt_recipm1_alphas_cumprod,
            self.posterior_mean_coef1,
            self.posterior_mean_coef2,
            self.posterior_log_variance_clipped,
            self.betas.log(),
            noise_scale,
            self.timestep_map.double(),
        )
        return torch.stack(columns, 1).to(device, torch.float32).contiguous()
