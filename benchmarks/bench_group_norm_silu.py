"""GroupNorm, scale and shift per image and SiLU against PyTorch's separate operators, forward and by x.

The baseline is what PyTorch users write: `group_norm`, a product and a sum with per-image vectors, `silu`; backward it
is autograd through these. Errors are against the plain version in float32, on the same inputs.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from harness import Case, main
from torch import Tensor

from sda_fast import ops
from sda_fast.reference import group_norm_silu as plain

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPES = {
    # The bar, and the sizes of small models.
    "cpu": [[4, 256, 128, 128], [28, 64, 16, 16], [28, 32, 32, 32]],
    "cuda": [[n, 256, size, size] for n in (16, 32) for size in (256, 128)] + [[32, 1024, 16, 16]],
}
GROUPS, EPS = 32, 1e-5


def cases(device: str, tiny: bool) -> Iterator[Case]:
    backend = {"cpu": "cpp", "cuda": "triton"}[device]
    for shape in [[2, 64, 8, 8]] if tiny else SHAPES[device]:
        for dtype in (torch.bfloat16, torch.float32):
            for layout, memory_format in LAYOUTS.items():
                x = torch.randn(shape, device=device).to(dtype=dtype, memory_format=memory_format)
                yield from cases_of(x, backend, layout)


def cases_of(x: Tensor, backend: str, layout: str) -> Iterator[Case]:
    shape, dtype, device = list(x.shape), x.dtype, x.device
    weight, bias = torch.rand(2, shape[1], device=device) + 0.5
    scale, shift = torch.randn(2, *shape[:2], device=device) / 4
    dy = torch.randn_like(x)
    # In x's dtype, as PyTorch insists on it.
    vectors = [v.to(dtype) for v in (weight, bias, scale[:, :, None, None], shift[:, :, None, None])]

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        with ops.backend(backend):
            return torch.ops.sda_fast.group_norm_silu(x, weight, bias, GROUPS, EPS, scale, shift, True)

    def theirs(x: Tensor) -> Tensor:
        normalised = F.group_norm(x, GROUPS, vectors[0], vectors[1], EPS)
        return F.silu(normalised * (1 + vectors[2]) + vectors[3])

    def forward_error() -> float:
        expected = plain.group_norm_silu(x.float(), weight, bias, GROUPS, EPS, scale, shift)
        return (ours()[0].float() - expected).abs().max().item()

    names = {"backend": backend, "shape": shape, "dtype": str(dtype).removeprefix("torch."), "layout": layout}
    size = x.numel() * x.element_size()
    # Numbers reach 10 forward and 5 backward: half a last place, and a few more in float32.
    last_place = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-8}[dtype]
    yield Case(
        op="group_norm_silu",
        run=ours,
        bytes=3 * size,
        error=forward_error,
        tolerance=10 * last_place,
        baseline=lambda: theirs(x),
        baseline_name="group_norm, scale-shift, silu",
        **names,
    )

    _, mean, rstd = ours()

    def ours_backward() -> Tensor:
        with ops.backend(backend):
            return torch.ops.sda_fast.group_norm_silu_backward(
                dy, x, weight, bias, mean, rstd, scale, shift, GROUPS, True
            )

    def backward_error() -> float:
        statistics = plain.group_norm_statistics(x.float(), GROUPS, EPS)
        arguments = (dy.float(), x.float(), weight, bias, *statistics, scale, shift, GROUPS)
        return (ours_backward().float() - plain.group_norm_silu_backward(*arguments)).abs().max().item()

    leaf = x.detach().requires_grad_()
    y = theirs(leaf)
    yield Case(
        op="group_norm_silu_backward",
        run=ours_backward,
        bytes=5 * size,
        error=backward_error,
        tolerance=16 * last_place,
        baseline=lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True),
        baseline_name="autograd of these",
        **names,
    )
    if device.type == "cuda" or x.numel() < 10_000:  # only the GPU's engines ask for it: `engines.fusion`
        yield split_case(x, dy, (weight, bias, scale, shift), theirs, 24 * last_place, names)


def split_case(
    x: Tensor,
    dy: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor, Tensor],
    theirs: Callable[[Tensor], Tensor],
    tolerance: float,
    names: dict[str, Any],
) -> Case:
    """The gradient of a norm after a convolution whose bias it takes, plus another gradient, in two parts."""
    weight, bias, scale, shift = parameters
    x_bias, residual = torch.randn(x.shape[1], device=x.device), torch.randn_like(x)
    first = x.shape[1] // 2
    raised = plain.add_channels(x.float(), x_bias)
    statistics = plain.group_norm_statistics(raised, GROUPS, EPS)

    def ours() -> tuple[Tensor, Tensor]:
        rest = (*statistics, scale, shift, GROUPS, True, first, x_bias, residual)
        with ops.backend(names["backend"]):
            return torch.ops.sda_fast.group_norm_silu_backward_split(dy, x, weight, bias, *rest)

    leaf = raised.to(x.dtype).requires_grad_()
    y = theirs(leaf)

    def baseline() -> list[Tensor]:
        total = torch.autograd.grad(y, leaf, dy, retain_graph=True)[0] + residual
        memory_format = LAYOUTS[names["layout"]]
        return [part.contiguous(memory_format=memory_format) for part in total.tensor_split([first], dim=1)]

    def error() -> float:
        rest = (*statistics, scale, shift, GROUPS, True, None, residual.float())
        expected = plain.group_norm_silu_backward(dy.float(), raised, weight, bias, *rest)
        return (torch.cat(ours(), 1).float() - expected).abs().max().item()

    return Case(
        op="group_norm_silu_backward_split",
        run=ours,
        bytes=6 * x.numel() * x.element_size(),
        error=error,
        tolerance=tolerance,
        baseline=baseline,
        baseline_name="autograd, a sum, two copies",
        **names,
    )


if __name__ == "__main__":
    main(cases)
