"""3x3 convolution by Winograd's minimal filtering, for bfloat16 on the CPU.

There is no GPU version: tensor cores take more from the direct convolution than 2.25 times fewer products give back.
"""

from typing import Any

import torch
from torch import Tensor

from sda_fast.errors import SdaError
from sda_fast.ops._backend import core, select
from sda_fast.ops._checks import check_device, check_dtype, check_shape
from sda_fast.reference import winograd_convolution as plain

VERSIONS = ("cpp", "plain")
CHANNELS, KERNELS = 16, 32  # their numbers must be multiples of these
COLUMNS = (64, 32)  # kernels computed at once: the first that divides their number


def pack_kernels(weight: Tensor) -> Tensor:
    """What `winograd_convolution` takes for kernels weight [K, C, 3, 3], K a multiple of 32 and C of 16.

    Returns G w G^T, bfloat16 [K / B, 16, C / 2, B, 2] with B = 64 or 32 (`COLUMNS`), computed in float64. Raises
    SdaError for another shape.
    """
    divides = weight.dim() == 4 and weight.shape[0] % KERNELS == weight.shape[1] % CHANNELS == 0
    if not divides or weight.shape[2:] != (3, 3):
        raise SdaError(
            f"weight has shape {tuple(weight.shape)}; winograd_convolution takes [K, C, 3, 3] with K a multiple of "
            f"{KERNELS} and C of {CHANNELS}: use conv2d for others."
        )
    kernels, channels = weight.shape[:2]
    transformed = plain.transform_kernels(weight.double()).to(torch.bfloat16)
    columns = next(columns for columns in COLUMNS if kernels % columns == 0)
    split = transformed.reshape(16, kernels // columns, columns, channels // 2, 2)
    return split.permute(1, 0, 3, 2, 4).contiguous()


def unpack_kernels(packed: Tensor) -> Tensor:
    """The [4, 4, K, C] of `reference.winograd_convolution` that was packed."""
    blocks, _, pairs, columns, _ = packed.shape
    return packed.permute(1, 0, 3, 2, 4).reshape(4, 4, blocks * columns, 2 * pairs)


def winograd_convolution(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """conv2d(x, weight, bias, padding=1) with 2.25 times fewer products, where packed = pack_kernels(weight).

    In real numbers both are the same function. In bfloat16 the transformed pixels and kernels are rounded once more:
    the relative error of a convolution is about 4e-3 where conv2d's is 2e-3. Sums are float32.
    Source: Lavin and Gray, "Fast algorithms for convolutional neural networks", 2016, section 4.1.

    x: bfloat16 [N, C, H, W], H and W even; channels_last, else it is copied.
    packed: bfloat16 [K / B, 16, C / 2, B, 2]. bias: [K], float32 or bfloat16.
    Returns bfloat16 [N, K, H, W], channels_last.

    The C++ version needs a processor with AVX512-BF16; elsewhere the plain one runs, slowly: see `runs`. An image's
    result does not depend on the other images of the batch. There is no gradient.

    Raises SdaError for a wrong shape, dtype or device.
    """
    _check(x, packed, bias)
    return torch.ops.sda_fast.winograd_convolution(x, packed, bias)


def runs() -> bool:
    """Whether this processor has the instructions of the C++ version."""
    return bool(core().winograd_convolution_cpu_runs())


@torch.library.custom_op("sda_fast::winograd_convolution", mutates_args=())
def _convolution(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, packed, bias)
    version = select("winograd_convolution", x.device, VERSIONS, _missing_instructions)
    y = _empty_output(x, packed)
    if y.numel() == 0:
        return y
    if version == "plain":
        return y.copy_(plain.winograd_convolution(x, unpack_kernels(packed), bias))
    if x.stride(1) != 1:
        x = x.contiguous(memory_format=torch.channels_last)
    images, channels, height, width = x.shape
    offset = None if bias is None else bias.float().contiguous()
    c = core()
    convolution = c.WinogradConvolution(
        images=images,
        height=height,
        width=width,
        channels=channels,
        kernels=y.shape[1],
        columns=packed.shape[3],
        x=x.data_ptr(),
        x_stride_image=x.stride(0),
        x_stride_row=x.stride(2),
        x_stride_pixel=x.stride(3),
        packed=packed.data_ptr(),
        bias=0 if offset is None else offset.data_ptr(),
        y=y.data_ptr(),
    )
    threads = torch.get_num_threads()
    workspace = x.new_empty(c.winograd_convolution_cpu_workspace(convolution, threads), dtype=torch.uint8)
    c.winograd_convolution_cpu(convolution, workspace.data_ptr(), threads)
    return y


@_convolution.register_fake
def _(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return _empty_output(x, packed)


def _missing_instructions(version: str) -> str:
    return "" if version != "cpp" or runs() else "this processor has no AVX512-BF16 instructions"


def _empty_output(x: Tensor, packed: Tensor) -> Tensor:
    shape: Any = (x.shape[0], packed.shape[0] * packed.shape[3], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _check(x: Tensor, packed: Tensor, bias: Tensor | None) -> None:
    op = "winograd_convolution"
    fits = packed.dim() == 5 and packed.shape[1] == 16 and packed.shape[3] in COLUMNS and packed.shape[4] == 2
    if not fits or not packed.is_contiguous():
        raise SdaError(f"packed has shape {tuple(packed.shape)}; pass {op} what pack_kernels returned.")
    check_dtype(op, "packed", packed, torch.bfloat16)
    channels = 2 * packed.shape[2]
    if x.dim() != 4 or x.shape[1] != channels or x.shape[2] % 2 or x.shape[3] % 2:
        raise SdaError(
            f"x has shape {tuple(x.shape)}; pass {op} [N, {channels}, H, W] with H and W even for these kernels."
        )
    check_dtype(op, "x", x, torch.bfloat16)
    check_device("packed", packed, x)
    if bias is not None:
        check_shape(op, "bias", bias, (packed.shape[0] * packed.shape[3],))
        check_dtype(op, "bias", bias, torch.float32, torch.bfloat16)
        check_device("bias", bias, x)
