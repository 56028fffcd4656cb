"""Normal noise that depends on seed, image, step and element alone (formula in csrc/philox.h)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sda_fast.errors import SdaError
from sda_fast.ops._backend import core, on_device_of, select
from sda_fast.ops._checks import check_dtype
from sda_fast.ops._layout import image_layout
from sda_fast.reference import philox

VERSIONS = ("cuda", "cpp", "triton", "plain")
MAX_ELEMENTS = 2**34  # per image: four times the values of the counter's block word


def philox_normal(
    shape: Sequence[int],
    *,
    seed: int,
    identities: Tensor | Sequence[int],
    step: int,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Standard normal noise float32 of `shape` [N, ...], usually [N, C, H, W].

    The noise of an image depends on nothing but `seed` in [0, 2^64), its identity, `step` in [0, 2^32) and
    the element's index in logical C order: not on the batch, the memory format, the device or the backend.
    The C++, Triton and CUDA versions give the same bits, the plain one differs by at most 3 units in the
    last place.

    identities: N 64-bit numbers, a sequence in [-2^63, 2^64) or an int64 tensor [N]; a negative one stands
        for itself plus 2^64. From a tensor that is already on the device nothing waits for the device.
    device: where the noise is made; by default out's, else that of the identities' tensor, else the CPU.
    out: float32 of `shape` to be filled and returned, each image contiguous or channels_last.

    Raises SdaError for a wrong shape, range, dtype, device or stride.
    """
    shape = tuple(shape)
    device = _device(device, identities, out)
    _check_numbers(shape, seed, step)
    ids = identity_tensor(identities, shape[0], device)
    signed_seed = seed - 2**64 if seed >= 2**63 else seed
    if out is None:
        return torch.ops.sda_fast.philox_normal(ids, shape, signed_seed, step)
    if tuple(out.shape) != shape:
        raise SdaError(f"out has shape {tuple(out.shape)}, but {shape} was asked for; pass an out of that shape.")
    check_dtype("philox_normal", "out", out, torch.float32)
    image_layout(out, "out")
    torch.ops.sda_fast.philox_normal_out(out, ids, signed_seed, step)
    return out


@torch.library.custom_op("sda_fast::philox_normal", mutates_args=())
def _philox_normal(identities: Tensor, shape: Sequence[int], seed: int, step: int) -> Tensor:
    out = torch.empty(shape, dtype=torch.float32, device=identities.device)
    _fill(out, identities, seed, step)
    return out


@_philox_normal.register_fake
def _(identities: Tensor, shape: Sequence[int], seed: int, step: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=identities.device)


@torch.library.custom_op("sda_fast::philox_normal_out", mutates_args=("out",))
def _philox_normal_out(out: Tensor, identities: Tensor, seed: int, step: int) -> None:
    _fill(out, identities, seed, step)


@_philox_normal_out.register_fake
def _(out: Tensor, identities: Tensor, seed: int, step: int) -> None:
    return None


def _fill(out: Tensor, identities: Tensor, seed: int, step: int) -> None:
    """Fills out; seed is a signed 64-bit pattern."""
    check_dtype("philox_normal", "out", out, torch.float32)
    _check_numbers(tuple(out.shape), seed % 2**64, step)
    identities = identity_tensor(identities, len(out), out.device)
    version = select("philox_normal", out.device, VERSIONS)
    if version == "plain":
        out.copy_(philox.philox_normal(out.shape, seed=seed, identities=identities, step=step))
        return
    layout = image_layout(out, "out")
    identities = identities.contiguous()
    with on_device_of(out):
        if version == "triton":
            from sda_fast.kernels import philox_normal as kernel

            kernel.philox_normal(out, identities, seed=seed, step=step, layout=layout)
            return
        c = core()
        where, bits = c.ImageLayout(*layout), seed % 2**64
        if version == "cpp":
            threads = torch.get_num_threads()
            c.philox_normal_cpu(out.data_ptr(), c.float32, where, bits, identities.data_ptr(), step, threads)
        else:
            stream = torch.cuda.current_stream().cuda_stream
            c.philox_normal_cuda(out.data_ptr(), c.float32, where, bits, identities.data_ptr(), step, stream)


def _device(device: torch.device | str | None, identities: Tensor | Sequence[int], out: Tensor | None) -> torch.device:
    if out is not None:
        if device is not None and _full(torch.device(device)) != out.device:
            raise SdaError(f"out lies on {out.device}, but device={device} was asked for; leave one of them away.")
        return out.device
    if device is not None:
        return torch.device(device)
    return identities.device if isinstance(identities, Tensor) else torch.device("cpu")


def _full(device: torch.device) -> torch.device:
    """With its index, as tensors name their device."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _check_numbers(shape: tuple[int, ...], seed: int, step: int) -> None:
    if not shape or any(size < 0 for size in shape):
        raise SdaError(f"shape is {shape}; pass philox_normal [N, ...] with sizes from 0.")
    if math.prod(shape[1:]) > MAX_ELEMENTS:
        raise SdaError(f"shape is {shape}; philox_normal counts at most 2^34 elements per image, so draw smaller ones.")
    if not 0 <= seed < 2**64:
        raise SdaError(f"seed is {seed}; choose one in [0, 2^64).")
    if not 0 <= step < 2**32:
        raise SdaError(f"step is {step}; choose one in [0, 2^32).")


def identity_tensor(identities: Tensor | Sequence[int], images: int, device: torch.device) -> Tensor:
    """Identities as int64 [images] on the device, bit patterns of 64 bits; SdaError for a wrong range or shape."""
    if not isinstance(identities, Tensor):
        for identity in identities:
            if not -(2**63) <= identity < 2**64:
                raise SdaError(f"identities hold {identity}; choose numbers in [-2^63, 2^64).")
        signed = [identity - 2**64 if identity >= 2**63 else identity for identity in identities]
        identities = torch.tensor(signed, dtype=torch.int64)
    if identities.dtype != torch.int64 or tuple(identities.shape) != (images,):
        raise SdaError(
            f"identities are {identities.dtype} {tuple(identities.shape)}; pass one int64 per image, [{images}]."
        )
    # To the CPU the copy must be waited for: the C++ version would read identities that are still on their way.
    return identities.to(device, non_blocking=torch.device(device).type != "cpu")
