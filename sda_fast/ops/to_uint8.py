"""Images in [-1, 1] as bytes, in the order in which files store them.

There is no CUDA version: the Triton one is a single elementwise pass, and images are stored outside the loop.
"""

import torch
from torch import Tensor

from sda_fast.errors import SdaError
from sda_fast.ops._backend import core, dtype_code, on_device_of, select
from sda_fast.ops._checks import DTYPES, check_contiguous, check_device, check_dtype, check_shape, check_size
from sda_fast.ops._layout import pixels, strides
from sda_fast.reference import to_uint8 as plain

VERSIONS = ("cpp", "triton", "plain")
MODES = ("round", "truncate")


def to_uint8(x: Tensor, mode: str = "round", out: Tensor | None = None) -> Tensor:
    """x [N, C, H, W] in [-1, 1], float32, bfloat16 or float16, as uint8 [N, H, W, C], contiguous.

    "round": floor(255 ((x + 1) / 2) + 1/2), what torchvision's `save_image` stores; "truncate": floor(127.5 x + 128),
    what DiT's sampler stores. Every product and sum is rounded by itself in float32, halves are widened first, and
    values outside are clamped, so that all backends give the same bytes. NaN becomes 0: whoever cannot exclude it
    asks first, as `sda_fast.data.to_uint8` does.

    x: contiguous or channels_last, or images or channels cut out of such. out: to be filled and returned.

    Raises SdaError for a wrong mode, shape, dtype, device or stride.
    """
    if mode not in MODES:
        raise SdaError(f'mode is {mode!r}; to_uint8 knows mode="round" and mode="truncate", so choose one of them.')
    _check(x, out)
    if out is None:
        return torch.ops.sda_fast.to_uint8(x, mode == "truncate")
    torch.ops.sda_fast.to_uint8_out(x, mode == "truncate", out)
    return out


@torch.library.custom_op("sda_fast::to_uint8", mutates_args=())
def _to_uint8(x: Tensor, truncate: bool) -> Tensor:
    _check(x)
    out = torch.empty(_shape(x), dtype=torch.uint8, device=x.device)
    _fill(out, x, truncate)
    return out


@_to_uint8.register_fake
def _(x: Tensor, truncate: bool) -> Tensor:
    return torch.empty(_shape(x), dtype=torch.uint8, device=x.device)


@torch.library.custom_op("sda_fast::to_uint8_out", mutates_args=("out",))
def _to_uint8_out(x: Tensor, truncate: bool, out: Tensor) -> None:
    _check(x, out)
    _fill(out, x, truncate)


@_to_uint8_out.register_fake
def _(x: Tensor, truncate: bool, out: Tensor) -> None:
    return None


def _check(x: Tensor, out: Tensor | None = None) -> None:
    if x.dim() != 4:
        raise SdaError(f"x has shape {tuple(x.shape)}; pass to_uint8 images [N, C, H, W].")
    check_size("to_uint8", x)
    check_dtype("to_uint8", "x", x, *DTYPES)
    strides(x, "x")
    if out is None:
        return
    check_shape("to_uint8", "out", out, _shape(x))
    check_dtype("to_uint8", "out", out, torch.uint8)
    check_device("out", out, x)
    check_contiguous("to_uint8", "out", out)


def _shape(x: Tensor) -> tuple[int, ...]:
    images, channels, height, width = x.shape
    return images, height, width, channels


def _fill(out: Tensor, x: Tensor, truncate: bool) -> None:
    version = select("to_uint8", x.device, VERSIONS)
    images, channels, height, width = x.shape
    if version == "plain":
        out.copy_(plain.to_uint8(x, "truncate" if truncate else "round"))
    elif version == "triton":
        from sda_fast.kernels import to_uint8 as kernel

        with on_device_of(x):
            kernel.to_uint8(out, x, strides=strides(x, "x"), truncate=truncate)
    else:
        core().to_uint8_cpu(
            out=out.data_ptr(),
            x=pixels(x, "x"),
            dtype=dtype_code(x.dtype),
            images=images,
            channels=channels,
            pixels=height * width,
            truncate=truncate,
            threads=torch.get_num_threads(),
        )
