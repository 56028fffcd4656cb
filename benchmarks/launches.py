"""What launches at the shapes of ADM-256 ask of Triton: aligned pointers, sizes that divide by 16, strides of one.

`compilations()` of the kernels stands for odd tensors; here the launchers themselves say how they would call.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any
from unittest import mock

import torch
import triton

Compilation = tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = (torch.contiguous_format, torch.channels_last)
NAMES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
NAMES |= {torch.uint8: "*u8", torch.int64: "*i64"}


def launches() -> Iterator[tuple[str, Compilation]]:
    """(operator, (kernel, signature, constexprs, options)), each once; nothing runs."""
    seen = set()
    for dtype, layout in product(DTYPES, FORMATS):
        x, out = image(3, torch.float32, layout), image(6, dtype, layout)
        calls = {
            "guidance": [guidance(x, out, dtype, layout)],
            "reverse_step": [reverse_step(x, out, dtype, layout, drawn) for drawn in (False, True)],
            "to_uint8": [to_uint8(image(3, dtype, layout))],
        }
        for operator, call in ((operator, call) for operator, several in calls.items() for call in several):
            for compilation in recorded(call):
                if str(compilation) not in seen:
                    seen.add(str(compilation))
                    yield operator, compilation


def image(channels: int, dtype: torch.dtype, layout: torch.memory_format) -> torch.Tensor:
    """A batch of 256 x 256 pixels without memory."""
    return torch.empty(16, channels, 256, 256, dtype=dtype, device="meta", memory_format=layout)


def floats(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def guidance(x: torch.Tensor, out: torch.Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Callable[[], Any]:
    from sda_fast.kernels import guidance as kernel

    matrices = floats(16, 3, 64, 64), floats(64, 256), floats(64, 64), floats(100, 8), floats(2).long()
    return lambda: kernel.guidance(image(3, dtype, layout), floats(16), None, x, out, *matrices)


def reverse_step(
    x: torch.Tensor, out: torch.Tensor, dtype: torch.dtype, layout: torch.memory_format, drawn: bool
) -> Callable[[], Any]:
    from sda_fast.kernels import reverse_step as kernel
    from sda_fast.ops._layout import strides

    half, noise = image(3, dtype, layout), None if drawn else x
    returned = x if drawn else half  # through_network comes in either dtype
    tensors = dict(x=x, out=out, noise=noise, cotangent=half, through_network=returned, result=x)
    where = {name: (0, 0, 0) if t is None else tuple(strides(t, name)) for name, t in tensors.items()}
    numbers = dict(seed=1, clip=True, scale=6.0, joint=False, norm_group=10, real=16)
    vectors = dict(table=floats(100, 8), position=floats(2).long(), squares=floats(16))
    identities = floats(16).long() if drawn else None
    return lambda: kernel.reverse_step(tensors, where, identities=identities, **vectors, **numbers)


def to_uint8(x: torch.Tensor) -> Callable[[], Any]:
    from sda_fast.kernels import to_uint8 as kernel
    from sda_fast.ops._layout import strides

    out = torch.empty(16, 256, 256, 3, dtype=torch.uint8, device="meta")
    return lambda: kernel.to_uint8(out, x, strides=tuple(strides(x, "x")), truncate=False)


def recorded(call: Callable[[], Any]) -> list[Compilation]:
    """What a launcher launches."""
    found = []

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        values = dict(zip(kernel.arg_names, args, strict=False))
        values |= {name: kwargs.pop(name) for name in list(kwargs) if name in kernel.arg_names}
        signature, constexprs = specialised(kernel, values)
        found.append((kernel, signature, constexprs, kwargs))

    with mock.patch.object(triton.JITFunction, "run", note):
        call()
    return found


def specialised(kernel: Any, values: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """(signature, constexprs) by Triton's rules for a launch with these values; ":16" is a multiple of 16."""
    signature, constexprs = {}, {}
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (free and type(value) is int and value == 1):
            constexprs[name] = value
        elif isinstance(value, torch.Tensor):
            # Tensors begin at multiples of 16 bytes, as the caching allocator makes them.
            signature[name] = NAMES[value.dtype] + (":16" if not parameter.do_not_specialize_on_alignment else "")
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            wide = not -(2**31) <= value < 2**31
            signature[name] = ("i64" if wide else "i32") + (":16" if free and value % 16 == 0 else "")
    return signature, constexprs
