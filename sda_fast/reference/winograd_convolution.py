"""3x3 convolution by Winograd's minimal filtering, plainly: the oracle of the operator `winograd_convolution`.

Source: Lavin and Gray, "Fast algorithms for convolutional neural networks", 2016, section 4.1.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

FROM_PIXELS = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))  # B^T
FROM_KERNEL = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))  # G
TO_PIXELS = ((1, 1, 1, 0), (0, 1, -1, -1))  # A^T


def transform_kernels(weight: Tensor) -> Tensor:
    """G w G^T of kernels [K, C, 3, 3], in weight's dtype [4, 4, K, C]."""
    g = torch.tensor(FROM_KERNEL, dtype=weight.dtype, device=weight.device)
    return torch.einsum("ia,kcab,jb->ijkc", g, weight, g)


def winograd_convolution(x: Tensor, kernels: Tensor, bias: Tensor | None = None) -> Tensor:
    """conv2d(x, weight, bias, padding=1) with kernels = transform_kernels(weight): x [N, C, H, W], H and W even,
    -> [N, K, H, W] in x's dtype. What is transformed is rounded to the dtype of `kernels`; sums are float32, or float64
    where x is.
    """
    precision = torch.float64 if x.dtype == torch.float64 else torch.float32
    from_pixels, to_pixels = (torch.tensor(t, dtype=precision, device=x.device) for t in (FROM_PIXELS, TO_PIXELS))
    tiles = F.pad(x.to(precision), (1, 1, 1, 1)).unfold(2, 4, 2).unfold(3, 4, 2)  # [N, C, H/2, W/2, 4, 4]
    pixels = torch.einsum("ia,nchwab,jb->ijnhwc", from_pixels, tiles, from_pixels).to(kernels.dtype)
    sums = torch.einsum("ijnhwc,ijkc->nkhwij", pixels.to(precision), kernels.to(precision))
    y = torch.einsum("ia,nkhwab,jb->nkhiwj", to_pixels, sums, to_pixels)
    y = y.reshape(x.shape[0], kernels.shape[2], *x.shape[2:])
    if bias is not None:
        y = y + bias.to(precision)[:, None, None]
    return y.to(x.dtype)
