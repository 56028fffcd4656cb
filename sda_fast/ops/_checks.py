"""What several operators refuse, each in one sentence with the way out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sda_fast.errors import SdaError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of images; everything is computed in float32
MAX_ELEMENTS = 2**30  # per image, where kernels count them in 32 bits
COLUMNS = 8  # of Schedule.step_table


def check_size(op: str, x: Tensor) -> None:
    """Of images x [N, ...]."""
    if x.shape[1:].numel() > MAX_ELEMENTS:
        raise SdaError(f"x has shape {tuple(x.shape)}; {op} counts at most 2^30 elements per image, so cut the images.")


def check_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise SdaError(f"{name} has shape {tuple(tensor.shape)}; for this x pass {op} one of shape {tuple(shape)}.")


def check_dtype(op: str, name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        *others, last = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes)
        wanted = f"{', '.join(others)} or {last}" if others else last
        raise SdaError(f"{name} is {tensor.dtype}; pass {op} one in {wanted}.")


def check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise SdaError(f"{name} lies on {tensor.device} and x on {x.device}; pass both on one device.")


def check_contiguous(op: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise SdaError(f"{name} has strides {tensor.stride()}; pass {op} a contiguous one.")


def check_output(op: str, out: Tensor, x: Tensor) -> None:
    """Of the network at images x [N, C, H, W]: [N, C or 2C, H, W]."""
    images, channels, height, width = x.shape
    if tuple(out.shape) not in ((images, channels, height, width), (images, 2 * channels, height, width)):
        raise SdaError(
            f"out has shape {tuple(out.shape)}; for this x pass {op} [{images}, {channels} or, with learned variance, "
            f"{2 * channels}, {height}, {width}]."
        )
    check_dtype(op, "out", out, *DTYPES)
    check_device("out", out, x)


def check_step(op: str, table: Tensor, position: Tensor, x: Tensor) -> None:
    """The coefficients of the steps, and which step it is."""
    if table.dim() != 2 or table.shape[0] == 0 or table.shape[1] != COLUMNS:
        raise SdaError(f"table has shape {tuple(table.shape)}; pass {op} Schedule.step_table(), [T, {COLUMNS}].")
    if tuple(position.shape) != (2,):
        raise SdaError(
            f"position has shape {tuple(position.shape)}; pass {op} [2]: the index into the table and the counter of "
            "the noise."
        )
    check_dtype(op, "table", table, torch.float32)
    check_dtype(op, "position", position, torch.int64)
    for name, tensor in (("table", table), ("position", position)):
        check_device(name, tensor, x)
        check_contiguous(op, name, tensor)
