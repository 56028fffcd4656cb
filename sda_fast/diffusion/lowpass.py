"""The low-pass filter of DDA's guidance as constant matrices (docs/architecture.md, "The guided step")."""

import torch
from torch import Tensor

from sda_fast.errors import SdaError


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5 (Keys 1981)."""
    x = x.abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, near, torch.where(x <= 2, far, torch.zeros_like(x)))


def resize_matrix(size: int, out_size: int) -> Tensor:
    """Cubic resampling of one axis as a float64 matrix [out_size, size], widened against aliasing when shrinking.

    Every row's weights sum to one *before* those that fall outside the image are dropped: the image is taken to be
    zero out there, as the published code has it.
    """
    scale = out_size / size
    stretch = min(1.0, scale)  # below one, the kernel widens
    centres = torch.arange(out_size, dtype=torch.float64) / scale + (size - 1) / 2 - (out_size - 1) / (2 * scale)
    reach = int(2 / stretch) + 2
    positions = torch.arange(-reach, size + reach, dtype=torch.float64)
    weights = _cubic(stretch * (centres[:, None] - positions))
    weights = weights / weights.sum(1, keepdim=True)
    return weights[:, reach : reach + size].contiguous()


class LowPass:
    """phi(x) = up(down(x)): cubic, antialiased reduction of `size`x`size` images by `factor`, and cubic enlargement.

    phi is linear and separable: with the reduction P [n/D, n] and the enlargement Q [n, n/D], phi(x) = Q P x P^T Q^T.
    No image is ever resized; small constant matrices are multiplied (in float32, kept as float64 on the CPU).
    Raises SdaError if `factor` does not divide `size`.
    """

    def __init__(self, size: int, factor: int):
        if factor < 1 or size % factor:
            raise SdaError(f"the low-pass factor D={factor} does not divide the image size {size}; choose a divisor")
        self.size, self.factor = size, factor
        self._down64 = resize_matrix(size, size // factor)
        self._up64 = resize_matrix(size // factor, size)
        self._gram64 = self._up64.T @ self._up64
        self._cache: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor, Tensor]] = {}

    def matrices(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """P [n/D, n], Q [n, n/D] and Q^T Q, contiguous, of the dtype and on the device of `like` [..., n, n]."""
        if like.shape[-2:] != (self.size, self.size):
            raise SdaError(f"this low-pass filter takes {self.size}x{self.size} images, not {list(like.shape[-2:])}")
        key = (like.device, like.dtype)
        if key not in self._cache:
            down, up, gram = (m.to(like) for m in (self._down64, self._up64, self._gram64))
            self._cache[key] = (down, up, gram)
        return self._cache[key]

    def down(self, x: Tensor) -> Tensor:
        """P x P^T: [..., n, n] -> [..., n/D, n/D]."""
        down, _, _ = self.matrices(x)
        return down @ x @ down.T

    def __call__(self, x: Tensor) -> Tensor:
        """phi(x): [..., n, n] -> the same."""
        _, up, _ = self.matrices(x)
        return up @ self.down(x) @ up.T

    def residual(self, reference_down: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """S(d) and ||phi(d)||^2 of each image for d = reference - x.

        reference_down [N, C, n/D, n/D] is `down(reference)`, computed once per image; x [N, C, n, n].
        Returns S = phi^T phi d [N, C, n, n] and float [N]. The gradient of ||phi(reference) - phi(x)|| with respect
        to x is -S / ||phi(d)||.
        """
        down, _, gram = self.matrices(x)
        low = reference_down - self.down(x)  # P d P^T
        smooth = gram @ low @ gram
        return down.T @ smooth @ down, (low * smooth).sum((1, 2, 3))

    def gradient(self, reference: Tensor, x: Tensor, norm_group: int = 1) -> tuple[Tensor, Tensor]:
        """||phi(reference) - phi(x)||_2 over each group of `norm_group` images in turn, and its gradient for x.

        reference, x [N, C, n, n]. Returns norms [ceil(N / norm_group)] and the gradient [N, C, n, n]; where a norm
        is zero its gradient is zero.
        """
        smooth, squares = self.residual(self.down(reference), x)
        norms = group_norms(squares, norm_group)
        per_image = norms.repeat_interleave(norm_group)[: len(x)]
        return norms, -smooth * reciprocal(per_image)[:, None, None, None]


def group_norms(squares: Tensor, norm_group: int) -> Tensor:
    """Square roots of the sums of [N] squared norms over groups of `norm_group`; the last group may be smaller."""
    groups = -(-len(squares) // norm_group)
    padded = torch.nn.functional.pad(squares, (0, groups * norm_group - len(squares)))
    return padded.reshape(groups, norm_group).sum(1).sqrt()


def reciprocal(norms: Tensor) -> Tensor:
    """1 / norm, and zero where the norm is zero: no residual, no guidance."""
    return torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
