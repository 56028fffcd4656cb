"""Low-pass guidance: from x_t and the network's output to what is sent back through the network.

It exists in all versions. The Triton and CUDA ones keep their intermediate sums, a fraction of the image's size, in
workspaces that are allocated here.
"""

import torch
from torch import Tensor

from sda_fast.errors import SdaError
from sda_fast.ops._backend import core, dtype_code, on_device_of, select
from sda_fast.ops._checks import (
    check_contiguous,
    check_device,
    check_dtype,
    check_output,
    check_shape,
    check_size,
    check_step,
)
from sda_fast.ops._layout import wrong_strides
from sda_fast.reference import guidance as plain

VERSIONS = ("cuda", "cpp", "triton", "plain")
MAX_ROWS = 2**31 - 1  # of all images: what a grid of blocks can count


def guidance(
    x: Tensor,
    out: Tensor,
    reference_down: Tensor,
    down: Tensor,
    gram: Tensor,
    table: Tensor,
    position: Tensor,
    *,
    return_x0: bool = False,
) -> tuple[Tensor, ...]:
    """The unnormalised gradient of DDA's guidance with respect to the clamped x_0, and its squared norm.

        raw = a x - b eps,  x0 = clamp(raw, -1, 1)            a, b = table[position[0]]
        low = reference_down - P x0 P^T,  smooth = G low G
        squares = <low, smooth>                               ||phi(reference) - phi(x0)||^2 of each image
        cotangent = P^T smooth P where -1 <= raw <= 1, else 0

    The gradient of ||phi(reference) - phi(x0)|| with respect to eps is b cotangent / sqrt(squares). Without a
    residual it is exactly zero. A NaN in x or out makes the image's squares NaN. Source: Gao et al. 2023 (DDA),
    algorithm 1; docs/architecture.md, "The guided step".

    x: x_t, float32 [N, C, n, n].
    out: the network's output, float32, bfloat16 or float16 [N, C or 2C, n, n]; its first C channels are eps. x and out
        are each contiguous or channels_last, or slices of such tensors.
    reference_down: P reference P^T, float32 [N, C, m, m], m = n / D, as `LowPass.down` gives it.
    down, gram: `LowPass`'s P [m, n] and G [m, m], float32, contiguous. Only their bands are read, the 4D columns of
        row r of P from D r - floor(3D/2) on and seven of G, so nothing but these two matrices will do.
    table: `Schedule.step_table`, float32 [T, 8], contiguous; its first two columns are a and b.
    position: int64 [2]; position[0], the index into the table, is read on the device; outside of the table squares
        become NaN (the plain version raises).

    Returns cotangent [N, C, n, n] in out's dtype and memory format, squares float32 [N] and, if return_x0, x0 float32
    [N, C, n, n] in x's memory format. On a backend an image's results do not depend on the others in its batch.

    Raises SdaError for a wrong shape, dtype, device or stride, and for more than 2^30 elements per image or 2^31 - 1
    rows of pixels in all.
    """
    _check(x, out, reference_down, down, gram, table, position)
    operator = torch.ops.sda_fast.guidance_x0 if return_x0 else torch.ops.sda_fast.guidance
    results: tuple[Tensor, ...] = operator(x, out, reference_down, down, gram, table, position)
    return results


@torch.library.custom_op("sda_fast::guidance", mutates_args=())
def _guidance(
    x: Tensor, out: Tensor, reference_down: Tensor, down: Tensor, gram: Tensor, table: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    _check(x, out, reference_down, down, gram, table, position)
    cotangent, squares = _cotangent_like(x, out), x.new_empty(len(x))
    _fill(cotangent, squares, None, x, out, reference_down, down, gram, table, position)
    return cotangent, squares


@_guidance.register_fake
def _(
    x: Tensor, out: Tensor, reference_down: Tensor, down: Tensor, gram: Tensor, table: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    return _cotangent_like(x, out), x.new_empty(x.shape[0])


@torch.library.custom_op("sda_fast::guidance_x0", mutates_args=())
def _guidance_x0(
    x: Tensor, out: Tensor, reference_down: Tensor, down: Tensor, gram: Tensor, table: Tensor, position: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, out, reference_down, down, gram, table, position)
    cotangent, squares, x0 = _cotangent_like(x, out), x.new_empty(len(x)), _x0_like(x)
    _fill(cotangent, squares, x0, x, out, reference_down, down, gram, table, position)
    return cotangent, squares, x0


@_guidance_x0.register_fake
def _(
    x: Tensor, out: Tensor, reference_down: Tensor, down: Tensor, gram: Tensor, table: Tensor, position: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _cotangent_like(x, out), x.new_empty(x.shape[0]), _x0_like(x)


def _fill(
    cotangent: Tensor,
    squares: Tensor,
    x0: Tensor | None,
    x: Tensor,
    out: Tensor,
    reference_down: Tensor,
    down: Tensor,
    gram: Tensor,
    table: Tensor,
    position: Tensor,
) -> None:
    version = select("guidance", x.device, VERSIONS, lambda version: _too_large_for(version, x, out, down))
    if version == "plain":
        results = plain.guidance(x, out, reference_down, down, gram, table, position)
        for target, result in zip((cotangent, squares, x0), results, strict=True):
            if target is not None:
                target.copy_(result)
        return
    if x.numel() == 0:
        return
    reference_down = reference_down.contiguous()
    with on_device_of(x):
        if version == "triton":
            from sda_fast.kernels import guidance as kernel

            kernel.guidance(cotangent, squares, x0, x, out, reference_down, down, gram, table, position)
            return
        c = core()
        tensors = c.GuidanceTensors(
            images=x.shape[0],
            channels=x.shape[1],
            size=x.shape[2],
            low=down.shape[0],
            dtype=dtype_code(out.dtype),
            interleaved=_interleaved(out),
            x=x.data_ptr(),
            x_strides=c.ImageStrides(*x.stride()),
            out=out.data_ptr(),
            out_strides=c.ImageStrides(*out.stride()),
            reference_down=reference_down.data_ptr(),
            down=down.data_ptr(),
            gram=gram.data_ptr(),
            table=table.data_ptr(),
            steps=len(table),
            position=position.data_ptr(),
            cotangent=cotangent.data_ptr(),
            squares=squares.data_ptr(),
            x0=0 if x0 is None else x0.data_ptr(),
            x0_strides=c.ImageStrides(*(x if x0 is None else x0).stride()),
        )
        if version == "cpp":
            threads = torch.get_num_threads()
            workspace = x.new_empty(c.guidance_cpu_workspace(tensors, threads), dtype=torch.uint8)
            c.guidance_cpu(tensors, workspace.data_ptr(), threads)
        else:
            workspace = x.new_empty(c.guidance_cuda_workspace(tensors), dtype=torch.uint8)
            c.guidance_cuda(tensors, workspace.data_ptr(), torch.cuda.current_stream().cuda_stream)


def _too_large_for(version: str, x: Tensor, out: Tensor, down: Tensor) -> str:
    """Why a version does not take these sizes: the CUDA one holds whole rows in shared memory."""
    channels, size = x.shape[1:3]
    if version != "cuda" or core().guidance_cuda_fits(channels, size, len(down), _interleaved(out)):
        return ""
    return f"rows of {size} pixels, to be reduced to {len(down)}, exceed a block's shared memory"


def _interleaved(x: Tensor) -> bool:
    """Whether x [N, C, H, W] has its channels side by side, as channels_last, rather than its columns."""
    return x.stride(3) != 1 and x.stride(1) == 1


def _format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if _interleaved(x) else torch.contiguous_format


def _cotangent_like(x: Tensor, out: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=out.dtype, device=out.device, memory_format=_format(out))


def _x0_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.float32, device=x.device, memory_format=_format(x))


def _check(
    x: Tensor, out: Tensor, reference_down: Tensor, down: Tensor, gram: Tensor, table: Tensor, position: Tensor
) -> None:
    op = "guidance"
    if x.dim() != 4 or x.shape[1] == 0 or x.shape[2] == 0 or x.shape[2] != x.shape[3]:
        raise SdaError(f"x has shape {tuple(x.shape)}; pass guidance square images [N, C, n, n].")
    images, channels, n, _ = x.shape
    check_size(op, x)
    if images * channels * n > MAX_ROWS:
        raise SdaError(f"x has shape {tuple(x.shape)}; guidance counts at most 2^31 - 1 rows, so pass fewer images.")
    if down.dim() != 2 or down.shape[1] != n or down.shape[0] == 0 or n % down.shape[0]:
        raise SdaError(
            f"down has shape {tuple(down.shape)}; pass guidance LowPass's matrix [n/D, n] for the image size n = {n} "
            "and a factor D that divides it."
        )
    m = down.shape[0]
    check_output(op, out, x)
    check_shape(op, "reference_down", reference_down, (images, channels, m, m))
    check_shape(op, "gram", gram, (m, m))
    for name, tensor in {"x": x, "reference_down": reference_down, "down": down, "gram": gram}.items():
        check_dtype(op, name, tensor, torch.float32)
        check_device(name, tensor, x)
    check_contiguous(op, "down", down)
    check_contiguous(op, "gram", gram)
    check_step(op, table, position, x)
    for name, tensor in {"x": x, "out": out}.items():
        if 1 not in (tensor.stride(1), tensor.stride(3)):
            raise wrong_strides(tensor, name, "its columns or its channels must lie side by side")
