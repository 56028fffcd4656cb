"""One reverse step of the diffusion in one pass over memory (formula in csrc/reverse_step.h)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sda_fast.errors import SdaError
from sda_fast.ops._backend import core, dtype_code, on_device_of, select
from sda_fast.ops._checks import check_device, check_dtype, check_output, check_shape, check_size, check_step
from sda_fast.ops._layout import pixels, strides
from sda_fast.ops.philox_normal import identity_tensor
from sda_fast.reference import reverse_step as plain

VERSIONS = ("cuda", "cpp", "triton", "plain")
NORMS = ("image", "batch")


def reverse_step(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    position: Tensor,
    *,
    noise: Tensor | None = None,
    seed: int | None = None,
    identities: Tensor | Sequence[int] | None = None,
    clip: bool = True,
    cotangent: Tensor | None = None,
    through_network: Tensor | None = None,
    squares: Tensor | None = None,
    scale: float = 0.0,
    norm: str = "image",
    norm_group: int = 1,
    real: int | None = None,
    result: Tensor | None = None,
) -> Tensor:
    """x_{t-1} from x_t and the network's output, float32 [N, C, H, W].

        x0      = a x - b eps, clamped to [-1, 1] where `clip`
        x_{t-1} = c1 x0 + c2 x + sigma z + scale w (a cotangent - b through_network)
        sigma   = noise_scale exp((high + low) / 4 + (high - low) / 4 v); without v noise_scale exp(high / 2)

    Sources: Ho et al. 2020, algorithm 2; Nichol and Dhariwal 2021, equation 15 (sigma); Gao et al. 2023, algorithm 1
    (the last term, the guidance, with S = phi^T phi d as cotangent; see docs/architecture.md). At index 0 of a
    schedule noise_scale is zero, and neither z nor v matters.

    x: float32 [N, C, H, W].
    out: float32, bfloat16 or float16, [N, C, H, W] = eps, or [N, 2C, H, W] = eps, v.
    table: `Schedule.step_table(device)`, float32 [T, 8], contiguous.
    position: int64 [2] on the device and read there: the index into the table, and the counter of the noise, `step`
        of `philox_normal`, of which 32 bits count. Outside of the table everything becomes NaN (the plain version
        raises).
    noise: z, float32 [N, C, H, W]; or
    seed, identities: z is drawn inside, with the bits of `philox_normal`: seed in [0, 2^64), identities [N] as there.
    cotangent, through_network: [N, C, H, W] in out's dtype, the masked S(d) and its vector-Jacobian product through
        eps, which may also be float32, as autograd returns it; both and `squares` or none. What overflowed in float16
        is infinite here, and so is the result.
    squares: float32 [N], ||phi(d)||^2.
    scale, norm, norm_group, real: norm="image": w = 1 / sqrt(norm_group squares); norm="batch": one over the root of
        the sum of squares over the `norm_group` consecutive images an image belongs to. Zero where the norm is zero.
        Images from `real` on are padding, their squares are taken as zero.
    result: float32 [N, C, H, W] to be written and returned. It may be x itself, else it overlaps no input.

    Images are contiguous or channels_last, or images or channels cut out of such, each tensor in its own layout;
    nothing is copied. A new result has the layout of x. Everything is computed in float32, and the C++, Triton and
    CUDA versions give the same bits.

    Raises SdaError for a wrong shape, dtype, device, stride or range, and where z or a part of the guidance lacks.
    """
    _check_images(x, out, noise, cotangent, through_network, result)
    check_step("reverse_step", table, position, x)
    real = len(x) if real is None else real
    _check_guidance(x, cotangent, through_network, squares, norm, norm_group, real)
    ids, bits = _draw(x, noise, seed, identities)
    images = (noise, cotangent, through_network)
    rest = (ids, bits, clip, squares, scale, norm, norm_group, real)
    if result is None:
        return torch.ops.sda_fast.reverse_step(x, out, table, position, *images, *rest)
    torch.ops.sda_fast.reverse_step_out(x, out, table, position, *images, *rest, result)
    return result


@torch.library.custom_op("sda_fast::reverse_step", mutates_args=())
def _reverse_step(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    position: Tensor,
    noise: Tensor | None,
    cotangent: Tensor | None,
    through_network: Tensor | None,
    identities: Tensor | None,
    seed: int,
    clip: bool,
    squares: Tensor | None,
    scale: float,
    norm: str,
    norm_group: int,
    real: int,
) -> Tensor:
    result = torch.empty_like(x)
    images = (noise, cotangent, through_network)
    _fill(result, x, out, table, position, *images, identities, seed, clip, squares, scale, norm, norm_group, real)
    return result


@_reverse_step.register_fake
def _(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    position: Tensor,
    noise: Tensor | None,
    cotangent: Tensor | None,
    through_network: Tensor | None,
    identities: Tensor | None,
    seed: int,
    clip: bool,
    squares: Tensor | None,
    scale: float,
    norm: str,
    norm_group: int,
    real: int,
) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("sda_fast::reverse_step_out", mutates_args=("result",))
def _reverse_step_out(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    position: Tensor,
    noise: Tensor | None,
    cotangent: Tensor | None,
    through_network: Tensor | None,
    identities: Tensor | None,
    seed: int,
    clip: bool,
    squares: Tensor | None,
    scale: float,
    norm: str,
    norm_group: int,
    real: int,
    result: Tensor,
) -> None:
    images = (noise, cotangent, through_network)
    _fill(result, x, out, table, position, *images, identities, seed, clip, squares, scale, norm, norm_group, real)


@_reverse_step_out.register_fake
def _(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    position: Tensor,
    noise: Tensor | None,
    cotangent: Tensor | None,
    through_network: Tensor | None,
    identities: Tensor | None,
    seed: int,
    clip: bool,
    squares: Tensor | None,
    scale: float,
    norm: str,
    norm_group: int,
    real: int,
    result: Tensor,
) -> None:
    return None


def _fill(
    result: Tensor,
    x: Tensor,
    out: Tensor,
    table: Tensor,
    position: Tensor,
    noise: Tensor | None,
    cotangent: Tensor | None,
    through_network: Tensor | None,
    identities: Tensor | None,
    seed: int,
    clip: bool,
    squares: Tensor | None,
    scale: float,
    norm: str,
    norm_group: int,
    real: int,
) -> None:
    """Writes result; seed is a signed 64-bit pattern. Checks again: the registered operator is called by others too."""
    _check_images(x, out, noise, cotangent, through_network, result)
    check_step("reverse_step", table, position, x)
    _check_guidance(x, cotangent, through_network, squares, norm, norm_group, real)
    if noise is None and identities is None:
        raise SdaError("reverse_step needs noise: give the tensor noise, or seed and identities to draw it inside.")
    if identities is not None:
        identities = identity_tensor(identities, len(x), x.device)
    version = select("reverse_step", x.device, VERSIONS)
    common: dict[str, Any] = dict(clip=clip, scale=scale, norm_group=norm_group, real=real)
    if version == "plain":
        guidance: dict[str, Any] = dict(
            cotangent=cotangent, through_network=through_network, squares=squares, norm=norm
        )
        draw: dict[str, Any] = dict(noise=noise, seed=seed, identities=identities)
        result.copy_(plain.reverse_step(x, out, table, position, **draw, **guidance, **common))
        return
    tensors = dict(x=x, out=out, noise=noise, cotangent=cotangent, through_network=through_network, result=result)
    squares = None if squares is None else squares.contiguous()
    identities = None if identities is None else identities.contiguous()
    vectors = dict(table=table, position=position, identities=identities, squares=squares)
    joint = norm == "batch"
    with on_device_of(x):
        if version == "triton":
            from sda_fast.kernels import reverse_step as kernel

            where = {name: (0, 0, 0) if t is None else strides(t, name) for name, t in tensors.items()}
            kernel.reverse_step(tensors, where, **vectors, seed=seed, joint=joint, **common)
            return
        c = core()
        step = c.ReverseStep(
            images=x.shape[0],
            channels=x.shape[1],
            pixels=x.shape[2] * x.shape[3],
            dtype=dtype_code(out.dtype),
            through_network_dtype=dtype_code(out.dtype if through_network is None else through_network.dtype),
            learned=out.shape[1] > x.shape[1],
            **{name: pixels(tensor, name) for name, tensor in tensors.items()},
            **{name: 0 if tensor is None else tensor.data_ptr() for name, tensor in vectors.items()},
            steps=len(table),
            seed=seed % 2**64,
            joint=joint,
            **common,
        )
        if version == "cpp":
            c.reverse_step_cpu(step, torch.get_num_threads())
        else:
            c.reverse_step_cuda(step, torch.cuda.current_stream().cuda_stream)


def _check_images(
    x: Tensor,
    out: Tensor,
    noise: Tensor | None,
    cotangent: Tensor | None,
    through_network: Tensor | None,
    result: Tensor | None,
) -> None:
    op = "reverse_step"
    if x.dim() != 4:
        raise SdaError(f"x has shape {tuple(x.shape)}; pass reverse_step images [N, C, H, W].")
    check_size(op, x)
    check_dtype(op, "x", x, torch.float32)
    check_output(op, out, x)
    strides(x, "x")
    strides(out, "out")
    _check_image(x, "noise", noise, torch.float32)
    _check_image(x, "cotangent", cotangent, out.dtype)
    _check_image(x, "through_network", through_network, out.dtype, torch.float32)
    _check_image(x, "result", result, torch.float32)


def _check_image(x: Tensor, name: str, tensor: Tensor | None, *dtypes: torch.dtype) -> None:
    if tensor is not None:
        check_shape("reverse_step", name, tensor, x.shape)
        check_dtype("reverse_step", name, tensor, *dtypes)
        check_device(name, tensor, x)
        strides(tensor, name)


def _check_guidance(
    x: Tensor,
    cotangent: Tensor | None,
    through_network: Tensor | None,
    squares: Tensor | None,
    norm: str,
    norm_group: int,
    real: int,
) -> None:
    given = dict(cotangent=cotangent, through_network=through_network, squares=squares)
    lacking = [name for name, tensor in given.items() if tensor is None]
    if 0 < len(lacking) < len(given):
        raise SdaError(f"guidance lacks {' and '.join(lacking)}; give cotangent, through_network and squares, or none.")
    if squares is not None:
        check_shape("reverse_step", "squares", squares, (len(x),))
        check_dtype("reverse_step", "squares", squares, torch.float32)
        check_device("squares", squares, x)
    if norm not in NORMS:
        raise SdaError(f'norm is {norm!r}; reverse_step knows norm="image" and norm="batch", so choose one of them.')
    if norm_group < 1:
        raise SdaError(f"norm_group is {norm_group}; choose a number of images from 1.")
    if not 0 <= real <= len(x):
        raise SdaError(f"real is {real}; pass how many images are no padding, from 0 to {len(x)}.")


def _draw(
    x: Tensor, noise: Tensor | None, seed: int | None, identities: Tensor | Sequence[int] | None
) -> tuple[Tensor | None, int]:
    """The identities on the device and the seed as a signed 64-bit pattern; none where noise is given."""
    if noise is not None:
        if seed is not None or identities is not None:
            raise SdaError("noise was given together with seed or identities; give either noise or both of them.")
        return None, 0
    if seed is None or identities is None:
        raise SdaError("reverse_step needs noise: give the tensor noise, or seed and identities to draw it inside.")
    if not 0 <= seed < 2**64:
        raise SdaError(f"seed is {seed}; choose one in [0, 2^64).")
    return identity_tensor(identities, len(x), x.device), seed - 2**64 if seed >= 2**63 else seed
