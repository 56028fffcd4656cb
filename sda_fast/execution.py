"""How a set of images becomes fixed-size batches, and where each image's noise comes from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sda_fast.diffusion.samplers import Draw
from sda_fast.errors import SdaError
from sda_fast.ops import philox_normal


@dataclass(frozen=True)
class Batch:
    """`real` images from `start` on, filled up to `size` by repeating the last: convolutions round differently at
    different batch sizes, so every batch of a run has the same one."""

    start: int
    real: int
    size: int

    def take(self, x: Tensor) -> Tensor:
        """The batch of x [N, ...], padded: [size, ...]."""
        part = x[self.start : self.start + self.real]
        if self.real == self.size:
            return part
        return torch.cat([part, part[-1:].expand(self.size - self.real, *part.shape[1:])])


def batches(n: int, size: int | None) -> list[Batch]:
    """[0, n) in batches of `size`, the last one padded; one batch of all if `size` is None."""
    if n == 0:
        return []
    if size is None:
        return [Batch(0, n, n)]
    return [Batch(start, min(size, n - start), size) for start in range(0, n, size)]


class Noise:
    """Standard normal noise by image and step: counter-based from `seed` and identities, or given explicitly.

    identities: one integer in [-2^63, 2^63) per image, the only thing beside `seed`, step and element that its noise
    depends on. given: [steps, N, C, H, W] instead, `given[0]` the forward noise, `given[k]` that of reverse step k.
    """

    def __init__(
        self,
        images: Tensor,
        seed: int,
        identities: Sequence[int] | Tensor | None,
        given: Tensor | None,
        steps: int,
    ):
        n = len(images)
        if given is not None:
            if identities is not None:
                raise SdaError("give either noise or seeds, not both")
            if tuple(given.shape) != (steps, *images.shape):
                raise SdaError(f"noise has shape {list(given.shape)}; it must be {[steps, *images.shape]}")
            given = given.to(images)
        ids = _as_tensor(range(n) if identities is None else identities)
        if tuple(ids.shape) != (n,):
            raise SdaError(f"seeds must hold one integer for each of the {n} images, not shape {list(ids.shape)}")
        if n and (ids.is_floating_point() or ids.is_complex()):
            raise SdaError(f"seeds must be integers, not {ids.dtype}")
        self._given, self._ids, self._seed = given, ids.to(images.device, torch.int64), seed

    def first(self, batch: Batch, like: Tensor) -> Tensor:
        """The noise a batch starts from: float32 [batch.size, C, H, W] on the device of `like`."""
        if self._given is not None:
            return batch.take(self._given[0])
        identities = batch.take(self._ids)
        return philox_normal(like.shape, seed=self._seed, identities=identities, step=0, device=like.device)

    def draw(self, batch: Batch, k: int) -> Draw:
        """What reverse step k = 1, 2, ... of a batch draws its noise from."""
        if self._given is not None:
            return {"noise": batch.take(self._given[k])}
        return {"seed": self._seed, "identities": batch.take(self._ids)}


def _as_tensor(identities: Sequence[int] | Tensor) -> Tensor:
    try:
        return torch.as_tensor(identities)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SdaError(f"seeds must be integers in [-2^63, 2^63): {error}") from error


def check_images(images: Tensor, channels: int, size: int) -> Tensor:
    """Images as contiguous float32, or SdaError if they are not [N, channels, size, size] in [-1, 1], to a hundredth.

    Contiguous, because convolutions round differently in another memory format.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or tuple(images.shape[1:]) != (channels, size, size):
        shape = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise SdaError(f"images must be [N, {channels}, {size}, {size}] in [-1, 1], not {shape}; crop or resize them")
    if not images.is_floating_point():
        raise SdaError(f"images must be floating point in [-1, 1], not {images.dtype}; use x / 127.5 - 1")
    peak = images.abs().max().item() if len(images) else 0.0
    if not math.isfinite(peak):
        raise SdaError("images hold NaN or infinity; check what made them")
    if peak > 1.01:
        raise SdaError(f"images reach {peak:.4g} and must be in [-1, 1]; scale (uint8: x / 127.5 - 1) or clamp them")
    return images.float().contiguous()
