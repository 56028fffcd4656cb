"""Between stored images, uint8 in [0, 255], and what the models see, float in [-1, 1]."""

from typing import Literal

import numpy as np
import torch

from sda_fast import ops
from sda_fast.errors import SdaError

Quantization = Literal["round", "truncate"]


def to_unit(array: np.ndarray | torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
    """x / 127.5 - 1 as float32 [N, 3, H, W], contiguous, on a device, by default that of the input (numpy: the CPU).

    `array` is uint8, [H, W, 3] (N becomes 1) or [N, H, W, 3]; it is moved before it is made four times as large.
    Raises SdaError for another dtype or number of dimensions.
    """
    x = torch.from_numpy(np.ascontiguousarray(array)) if isinstance(array, np.ndarray) else array
    if x.dtype != torch.uint8 or x.ndim not in (3, 4):
        raise SdaError(f"to_unit takes uint8 [H, W, 3] or [N, H, W, 3], not {x.dtype} of {list(x.shape)}.")
    if x.ndim == 3:
        x = x[None]
    x = x.to(device)
    x = x.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    # Divided by a tensor on the same device: by a Python number, CUDA would multiply with the rounded inverse
    # and end one unit in the last place away from the CPU.
    return x / torch.full((), 127.5, device=x.device) - 1


def to_uint8(x: torch.Tensor, mode: Quantization = "round") -> np.ndarray:
    """Float [N, 3, H, W] in [-1, 1] as a uint8 numpy array [N, H, W, 3]; values outside are clamped.

    "round": floor(255 (x + 1) / 2 + 1/2), to the bit what torchvision's `save_image` stores for (x + 1) / 2;
    used by DDA and SDA for projected images. "truncate": floor(127.5 x + 128), what DiT's sampler stores for
    synthetic ones. On paper the two formulas are one; they differ in the order of rounding, hence by one
    level at rare ties. All is computed in float32, to which other precisions are converted first.

    Raises SdaError for an unknown mode and for images that hold NaN or infinity, which would be stored as if
    valid.
    """
    if mode not in ("round", "truncate"):
        raise SdaError(f'to_uint8 knows mode="round" and mode="truncate", not {mode!r}.')
    x = x.detach()
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        x = x.float()
    finite = x.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise SdaError(
            f"{bad} of {len(x)} images hold NaN or infinity after sampling: "
            "check the weights, or use a wider precision (fp32, or bf16 instead of fp16)."
        )
    if not x.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous()
    return ops.to_uint8(x, mode).cpu().numpy()
