"""What the inductor engine would run on a GPU, planned without one: calls and bytes of a step, by class.

    python benchmarks/gpu_plan.py [--preset adm-256-uncond] [--precision bf16] [--batch 16] [--output FILE.jsonl]

The step is traced on tensors without memory and given to PyTorch's compiler as if it lay on an H200; the compiler's own
schedule says what it fuses and how many bytes that moves. Of convolutions, products, norms and attention the bytes are
those of their operands, of norms as often as their kernels read them. cuDNN takes dense images only, so PyTorch copies
a slice of channels before a convolution: "copies". Nothing is compiled or run. Planned once as traced and once with
`engines.fusion`; prints a table, adds two rows to FILE.
"""

import argparse
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._dynamo.device_interface import CudaInterface
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor import ir
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch._prims_common import suggest_memory_format
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from sda_fast.bench.measure import environment
from sda_fast.bench.models import PRESETS, architecture
from sda_fast.bench.step import fake_step
from sda_fast.engines.fusion import GRADIENT, NORM, SPLIT_GRADIENT, fuse_for_gpu
from sda_fast.engines.graph import trace
from sda_fast.models import DiT

aten, ours = torch.ops.aten, torch.ops.sda_fast
H200 = dict(major=9, minor=0, multi_processor_count=132, warp_size=32, max_threads_per_multi_processor=2048)
H200 |= dict(regs_per_multiprocessor=65536, shared_memory_per_block_optin=232448, shared_memory_per_block=49152)
H200 |= dict(name="NVIDIA H200", total_memory=139 << 30, L2_cache_size=50 << 20, gcnArchName="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="adm-256-uncond")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="bf16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--output", type=Path, help="file that takes the rows, .jsonl")
    options = parser.parse_args()
    plans = {}
    for fused in (False, True):
        plans[fused] = plan_afresh(*architecture(options.preset), options.precision, options.batch, fused)
        row = {"benchmark": "gpu plan", "preset": options.preset, "precision": options.precision}
        row |= {"batch": options.batch, "fused": fused, "classes": plans[fused]}
        row |= {key: environment("cpu")[key] for key in ("torch", "triton", "commit")}
        if options.output:
            with options.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(table(plans, options.batch))


def plan_afresh(*asked: Any) -> dict[str, dict[str, int]]:
    """`plan` in a process of its own, as an engine is prepared: the compiler lays out differently what operators read
    that it has met before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(plan, *asked).result()


def plan(kind: Any, config: dict[str, Any], precision: Any, batch: int, fused: bool) -> dict[str, dict[str, int]]:
    """By class: calls of operators or kernels of the compiler's, and the bytes that they read and write."""
    # Models choose operators by device; autograd cannot run on a GPU that is none, and the ADM's are the same on both.
    device = "cuda" if kind is DiT else "cpu"
    calls: Counter[str] = Counter()
    moves: Counter[str] = Counter()
    with on_a_gpu(), fake_step(kind, config, precision, batch, device=device) as (step, example):
        with mock.patch.object(F, "scaled_dot_product_attention", lambda q, k, v: attention(q, k, v)[0]):
            graph = trace(step, example, channels_last=True)
        if fused:
            fuse_for_gpu(graph)
        compiler = Compiler()
        compiler.plan(*moved(graph, example))
        for name, size in compiler.moves():
            calls[name] += 1
            moves[name] += size
    return {name: {"calls": calls[name], "bytes": moves[name]} for name in sorted(calls)}


@torch.library.custom_op("gpu_plan::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Flash attention's operands and results: to choose the real one, PyTorch asks a GPU."""
    raise NotImplementedError  # planned with fake tensors, never run


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _as_flash_lays(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("gpu_plan::attention_backward", mutates_args=())
def attention_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError  # planned with fake tensors, never run


@attention_backward.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _as_flash_lays(q), _as_flash_lays(k), _as_flash_lays(v)


attention.register_autograd(
    lambda ctx, dy, _: attention_backward(dy, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


def _as_flash_lays(q: Tensor) -> Tensor:
    n, heads, tokens, channels = q.shape
    return q.new_empty(n, tokens, heads, channels).transpose(1, 2)


# Folding constants would compute them on the GPU.
SETTINGS = {"fx_graph_cache": False, "compile_threads": 1, "joint_graph_constant_folding": False}
CLASSES = {
    aten.convolution.default: "convolution",
    NORM: "norm",
    GRADIENT: "norm's gradient",
    SPLIT_GRADIENT: "norm's gradient",
    torch.ops.gpu_plan.attention.default: "attention",
    torch.ops.gpu_plan.attention_backward.default: "attention",
    **{packet.default: "matrix product" for packet in (aten.mm, aten.addmm, aten.bmm, aten._addmm_activation)},
    ours.guidance.default: "low-pass gradient",
    ours.modulate.default: "layer norm",
    ours.gate_residual.default: "gate",
}


@contextmanager
def on_a_gpu() -> Iterator[None]:
    """The compiler finds an H200, and convolutions lay their results as cuDNN's do."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    properties = SimpleNamespace(**H200)
    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)

    def layout(x: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
        formats = suggest_memory_format(x), suggest_memory_format(weight)
        return torch.channels_last if torch.channels_last in formats else torch.contiguous_format

    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (torch.cuda, "get_device_properties", lambda *_: properties),
        (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "device_count", lambda: 1),
        (CudaInterface.Worker, "get_device_properties", lambda *_: properties),
        (CudaInterface.Worker, "current_device", lambda: 0),
        (CudaInterface, "get_device_properties", lambda *_: properties),
        (CudaInterface, "current_device", lambda: 0),
        (CudaInterface, "get_compute_capability", lambda *_: 90),
        (CudaInterface, "is_available", lambda: True),
        (CudaInterface, "is_bf16_supported", lambda **_: True),
        (torch._C, "_conv_determine_backend_memory_format", layout),
    ]
    with ExitStack() as stack:
        for owner, name, instead in replaced:
            stack.enter_context(mock.patch.object(owner, name, instead))
        stack.enter_context(mock.patch.object(driver, "_active", target))
        yield


def moved(graph: fx.GraphModule, example: tuple[Tensor, ...]) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """The graph in the compiler's operators, of inputs and then constants on the GPU."""

    def there(x: Tensor) -> Tensor:
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cuda")

    for name, value in list(vars(graph).items()):
        if isinstance(value, Tensor):
            delattr(graph, name)
            graph.register_buffer(name, value)
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    graph.recompile()
    constants = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    inputs = tuple(there(x) for x in (*example, *constants.values()))

    def run(*tensors: Tensor) -> Any:
        given = dict(zip(constants, tensors[len(example) :], strict=True))
        return torch.func.functional_call(graph, given, tensors[: len(example)])

    return make_fx(run, decomposition_table=select_decomp_table())(*inputs), inputs


class Compiler:
    """PyTorch's compiler up to its schedule."""

    def __init__(self) -> None:
        self.graph: fx.Graph | None = None
        self.written: list[int] = []  # bytes of the kernels that it writes itself
        self.called = 0  # operators that it calls

    def plan(self, graph: fx.GraphModule, inputs: tuple[Tensor, ...]) -> None:
        with ExitStack() as stack:
            stack.enter_context(
                mock.patch.object(GraphLowering, "compile_to_module", lambda lowering: self._stop(lowering))
            )
            stack.enter_context(inductor_config.patch(SETTINGS))
            stack.enter_context(tracing(TracingContext(inputs[0].fake_mode)))  # type: ignore[attr-defined]
            stack.enter_context(warnings.catch_warnings())
            stack.enter_context(torch.no_grad())
            warnings.simplefilter("ignore")
            try:
                compile_fx(graph, list(inputs))
            except Exception:
                if self.graph is None:
                    raise

    def _stop(self, lowering: GraphLowering) -> None:
        lowering.codegen()
        for node in lowering.scheduler.nodes:
            if isinstance(node, ExternKernelSchedulerNode):
                self.called += not isinstance(node.node, ir.MultiOutput)
            elif not isinstance(node, NopKernelSchedulerNode):
                self.written.append(node.get_read_write_buffers_sizes())
        self.graph = lowering.module.graph
        raise RuntimeError("nothing is compiled")

    def moves(self) -> Iterator[tuple[str, int]]:
        """(class, bytes) of every call and every kernel."""
        yield from (("elementwise", size) for size in self.written)
        assert self.graph is not None
        called = 0
        for node in self.graph.nodes:
            name = CLASSES.get(node.target)
            if name is None:
                continue
            called += 1
            size = sum(map(_bytes, node.all_input_nodes)) + _bytes(node)
            if node.target is aten.convolution.default and not _dense(node.args[0].meta["val"]):
                yield "copies", 2 * _bytes(node.args[0])
            again = {NORM: 1, GRADIENT: 2, SPLIT_GRADIENT: 2}.get(node.target, 0)  # x, or dy and x, are read twice
            yield name, size + sum(map(_bytes, node.args[:again]))
        if called != self.called:
            raise RuntimeError(f"the compiler calls {self.called} operators, of which CLASSES knows {called}")


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def _bytes(node: fx.Node) -> int:
    tensors = [v for v in torch.utils._pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def table(plans: dict[bool, dict[str, dict[str, int]]], batch: int) -> str:
    lines = [f"{'':18}{'as traced':>26}{'fused':>26}"]
    names = sorted({name for plan in plans.values() for name in plan})
    for name in [*names, "all"]:
        line = f"{name:18}"
        for fused, width in ((False, 26), (True, 26)):
            rows = plans[fused].values() if name == "all" else [plans[fused].get(name, {"calls": 0, "bytes": 0})]
            calls, size = sum(r["calls"] for r in rows), sum(r["bytes"] for r in rows) / batch / 1e9
            line += f"{f'{calls} calls  {size:7.3f} GB':>{width}}"
        lines.append(line)
    return "\n".join([*lines, "GB per image"])


if __name__ == "__main__":
    main()
