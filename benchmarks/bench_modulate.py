"""modulate and gate_residual at the widths of DiT; the baseline is what the model writes, eagerly. The dtype of a row
is that of the products between them; what the blocks add to is float32.

Bytes: the tokens read and written; the rows of shift, scale and gate come from the cache. Tolerance: twice the
baseline's error against the float64 oracle.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Case, main
from torch import Tensor
from torch.nn import functional as F

from sda_fast import ops
from sda_fast.reference import modulate as oracle

TINY = 1e-6  # beside twice the baseline's error


def cases(device: str, tiny: bool) -> Iterator[Case]:
    backend = "triton" if device == "cuda" else "plain"
    shapes = [(2, 16, 72)] if tiny else [(4, 256, 1152)] if device == "cpu" else [(32, 256, 1152), (128, 256, 1152)]
    for shape in shapes:
        for dtype in (
            (torch.float32, torch.bfloat16, torch.float16) if device == "cuda" else (torch.float32, torch.bfloat16)
        ):
            generator = torch.Generator(device).manual_seed(0)
            x, y = (torch.randn(shape, device=device, generator=generator) for _ in range(2))
            y = y.to(dtype)  # as the model has it: what blocks add to stays in float32
            rows = torch.randn(shape[0], 6 * shape[2], device=device, generator=generator)
            shift, scale, gate, *_ = rows.chunk(6, dim=1)
            arguments = (x, shift, scale, 1e-6, dtype)
            yield case("modulate", backend, eager_modulate, arguments, x.nbytes + y.nbytes, dtype)
            yield case("gate_residual", backend, eager_gate_residual, (x, gate, y), 2 * x.nbytes + y.nbytes, dtype)


def eager_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return (F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]).to(dtype)


def eager_gate_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    return x + gate[:, None] * y


def case(
    op: str, backend: str, eager: Callable[..., Tensor], arguments: tuple[Any, ...], moved: int, dtype: torch.dtype
) -> Case:
    exact = getattr(oracle, op)(*(argument.double() for argument in arguments[:3]))

    def run() -> Tensor:
        with ops.backend(backend):
            return getattr(ops, op)(*arguments)

    def error(result: Tensor) -> float:
        return (result.double() - exact).abs().max().item()

    x = arguments[0]
    return Case(
        op=op,
        backend=backend,
        shape=list(x.shape),
        dtype=str(dtype).removeprefix("torch."),
        layout="contiguous",
        run=run,
        bytes=moved,
        error=lambda: error(run()),
        tolerance=2 * error(eager(*arguments)) + TINY,
        baseline=lambda: eager(*arguments),
        baseline_name="eager",
    )


if __name__ == "__main__":
    main(cases)
