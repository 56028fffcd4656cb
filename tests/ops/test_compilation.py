"""What ptxas reports of a kernel, read; what launches at real shapes take; the table of all of it."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

REPORT = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_80'
ptxas info    : Function properties for first
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 22 registers, used 0 barriers, 2048 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'second' for 'sm_80'
ptxas info    : Function properties for second
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 384 bytes cmem[0]
"""


def test_reading_what_ptxas_reports(compilation):
    first, second = compilation.parse(REPORT)
    assert vars(first) == dict(name="first", registers=22, shared=2048, spills=0, stack=0)
    assert vars(second) == dict(name="second", registers=255, shared=0, spills=12, stack=16)
    both = compilation.greediest([first, second])
    assert vars(both) == dict(name="first, second", registers=255, shared=2048, spills=12, stack=16)
    with pytest.raises(TypeError):
        compilation.parse("Compiling entry function 'x'\n")  # a report without the numbers is no clean bill


@pytest.fixture(scope="module")
def launches(compilation):
    """(operator, (kernel, signature, constexprs, options)) of launches at the shapes of ADM-256."""
    import launches

    return list(launches.launches())


@pytest.mark.parametrize("capability", [80, 90])
def test_real_launches_do_not_spill(compilation, launches, capability):
    assert {operator for operator, _ in launches} == {"guidance", "reverse_step", "to_uint8"}
    for operator, (kernel, signature, constexprs, options) in launches:
        compiled, resources = compilation.compile_triton(kernel, signature, constexprs, capability, **options)
        assert (resources.spills, resources.stack) == (0, 0), (kernel, constexprs)
        if operator == "reverse_step" and constexprs["FLAT"]:  # they read 16 bytes at once, or 8 of halves
            assert "ld.global.v" in compiled.asm["ptx"]


def test_triton_specialises_launches_so(launches):
    """By the rules of the Triton that is installed."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    import launches as module

    kernel = {operator: compilation[0] for operator, compilation in launches}["to_uint8"]
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    x, out = (module.image(3, dtype, torch.channels_last) for dtype in (torch.bfloat16, torch.uint8))
    values = dict(zip(kernel.arg_names, (out, x, 196608, 192, 3, 393216, 1, 6, False, 1024), strict=True))
    _, specialisation, _ = bind(*values.values())
    signature, constexprs = module.specialised(kernel, values)
    for (kind, value), name in zip(specialisation, kernel.arg_names, strict=True):
        assert (kind == "constexpr") == (name in constexprs)
        if kind != "constexpr":
            assert signature[name] == kind + (":16" if value == "D" else "")


def test_the_table_holds_every_kernel(compilation, launches):
    """benchmarks/results/kernels.json: every file and specialisation, both capabilities, no spill, and nothing else."""
    import resources

    rows = json.loads((ROOT / "benchmarks" / "results" / "kernels.json").read_text())
    assert not [row for row in rows if row["spills"] or row["stack"]]
    cuda = {f"csrc/cuda/{file.name}" for file in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert {row["source"] for row in rows if row["source"].startswith("csrc/")} == cuda
    expected = Counter(
        (*resources.name_of(operator, *kernel)[:3], capability)
        for operator, kernel in [*compilation.triton_kernels(), *launches]
        for capability in (80, 90)
    )
    found = Counter((row["source"], row["function"], row["specialisation"], row["sm"]) for row in rows)
    assert {key: n for key, n in found.items() if key[0] not in cuda} == expected
    assert {row["sm"] for row in rows if row["source"] in cuda} == {80, 90}
