"""Philox noise, plainly: the oracle of the operator `philox_normal`.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox4x32-10);
Box and Muller, 1958. Words are unsigned 32-bit numbers held in int64.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def philox_words(blocks: Tensor, *, seed: int, identities: Tensor, step: int | Tensor) -> Tensor:
    """The words of blocks int64 [B] in images with identities int64 [N] (bit patterns) -> int64 [N, B, 4].

    step: a number, or one as an int64 tensor [].
    """
    c0, c2 = torch.broadcast_tensors(blocks[None, :], (identities & MASK)[:, None])
    c1, c3 = torch.zeros_like(c0) + step, torch.broadcast_to((identities >> 32 & MASK)[:, None], c0.shape)
    k0, k1 = seed & MASK, seed >> 32 & MASK
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # exact modulo 2^64, which is all that the words need
        c0, c1, c2, c3 = (p1 >> 32 & MASK) ^ c1 ^ k0, p1 & MASK, (p0 >> 32 & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = k0 + 0x9E3779B9 & MASK, k1 + 0xBB67AE85 & MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def box_muller(words: Tensor) -> Tensor:
    """Pairs of words to pairs of normals: int64 [..., 2] (radius, angle) -> float32 [..., 2].

    The uniforms are exact in float32; float64 in between makes the normals the correctly rounded formula.
    """
    uniform = ((words >> 9).double() + 0.5) * 2.0**-23
    radius, angle = (-2 * uniform[..., 0].log()).sqrt(), 2 * math.pi * uniform[..., 1]
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).float()


def philox_normal(shape: Sequence[int], *, seed: int, identities: Tensor, step: int | Tensor) -> Tensor:
    """Noise float32 of `shape` [N, ...] for identities int64 [N]; element e is in block e // 4, at e % 4."""
    elements = math.prod(shape[1:])
    blocks = torch.arange((elements + 3) // 4, device=identities.device)
    words = philox_words(blocks, seed=seed, identities=identities, step=step)
    normals = box_muller(words.unflatten(-1, (2, 2))).flatten(1)
    return normals[:, :elements].reshape(tuple(shape))
