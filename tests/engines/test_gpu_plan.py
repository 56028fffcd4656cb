"""The inductor engine's plan for a GPU, made without one: what other operators take over leaves it."""

import pytest
import torch

from sda_fast.models import ADM, DiT

pytest.importorskip("triton")
gpu_plan = pytest.importorskip("gpu_plan")
pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="needs a PyTorch that was built for CUDA")

ADM_SMALL = {
    "image_size": 32,
    "model_channels": 64,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "num_head_channels": 64,
}
DIT_SMALL = {"input_size": 16, "hidden_size": 128, "depth": 2, "num_heads": 2, "num_classes": 10}
CALLED = ("attention", "convolution", "low-pass gradient", "matrix product", "norm", "norm's gradient")


@pytest.fixture(scope="module")
def adm():
    return [gpu_plan.plan_afresh(ADM, ADM_SMALL, "bf16", 2, fused) for fused in (False, True)]


def test_adm(adm):
    before, after = adm
    with torch.device("meta"):
        norms = sum(isinstance(m, torch.nn.GroupNorm) for m in ADM(**ADM_SMALL).modules())
    for plan in (before, after):
        assert plan["norm"]["calls"] == plan["norm's gradient"]["calls"] == norms
    assert [after[name]["calls"] for name in CALLED] == [before[name]["calls"] for name in CALLED]
    assert before["copies"]["calls"] > 0
    assert "copies" not in after
    assert after["elementwise"]["calls"] < 0.7 * before["elementwise"]["calls"]
    assert total(after) < 0.92 * total(before)


def test_dit():
    """The operators of this package that a DiT takes on a GPU are there."""
    before, after = (gpu_plan.plan_afresh(DiT, DIT_SMALL, "bf16", 2, fused) for fused in (False, True))
    depth = DIT_SMALL["depth"]
    for plan in (before, after):
        calls = {name: plan[name]["calls"] for name in ("attention", "layer norm", "gate")}
        assert calls == {"attention": depth, "layer norm": 2 * depth + 1, "gate": 2 * depth}
    assert after["matrix product"] == before["matrix product"]
    assert after["elementwise"]["calls"] == before["elementwise"]["calls"] - depth  # GELU
    assert total(after) < total(before)
    assert "copies" not in before


def test_no_operator_is_forgotten():
    compiler = gpu_plan.Compiler()
    compiler.graph, compiler.called = torch.fx.Graph(), 1
    with pytest.raises(RuntimeError, match="the compiler calls 1 operators, of which CLASSES knows 0"):
        list(compiler.moves())


def total(plan):
    return sum(entry["bytes"] for entry in plan.values())


def test_table(adm):
    first, *rest, last = gpu_plan.table(dict(zip((False, True), adm, strict=True)), 2).splitlines()
    assert first.split() == ["as", "traced", "fused"]
    assert {line.split("  ")[0] for line in rest} >= {*CALLED, "elementwise", "all"}
    assert last == "GB per image"
