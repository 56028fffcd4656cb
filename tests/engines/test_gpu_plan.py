"""The inductor engine's plan for a GPU, made without one: what other operators take over leaves it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sda_fast.models import ADM

pytest.importorskip("triton")
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
# In a process of its own: the compiler remembers that it found a GPU.
PROGRAM = """
import json, sys
import gpu_plan
from sda_fast.models import ADM, DiT

small = {"adm": (ADM, json.loads(sys.argv[1])), "dit": (DiT, json.loads(sys.argv[2]))}
keys = [("adm", "bf16"), ("adm", "fp32"), ("dit", "bf16")]
plans = [[gpu_plan.plan(*small[model], precision, 2, fused) for fused in (False, True)] for model, precision in keys]
print(json.dumps(plans))
print(gpu_plan.table(dict(zip((False, True), plans[0])), 2))
"""


@pytest.fixture(scope="module")
def planned():
    """By model and precision: the plan as traced and fused; then the table's lines."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(ADM_SMALL), json.dumps(DIT_SMALL)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2] / "benchmarks", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plans, *lines = done.stdout.splitlines()
    return dict(zip((("adm", "bf16"), ("adm", "fp32"), ("dit", "bf16")), json.loads(plans), strict=True)), lines


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_adm(planned, precision):
    before, after = planned[0]["adm", precision]
    with torch.device("meta"):
        norms = sum(isinstance(m, torch.nn.GroupNorm) for m in ADM(**ADM_SMALL).modules())
    for plan in (before, after):
        assert plan["norm"]["calls"] == plan["norm's gradient"]["calls"] == norms
    assert [after[name]["calls"] for name in CALLED] == [before[name]["calls"] for name in CALLED]
    assert before["copies"]["calls"] > 0
    assert "copies" not in after
    assert after["elementwise"]["calls"] < 0.7 * before["elementwise"]["calls"]
    assert total(after) < 0.92 * total(before)


def test_dit(planned):
    before, after = planned[0]["dit", "bf16"]
    depth = DIT_SMALL["depth"]
    assert after["attention"]["calls"] == before["attention"]["calls"] == depth
    assert after["matrix product"] == before["matrix product"]
    assert after["elementwise"]["calls"] == before["elementwise"]["calls"] - depth  # GELU
    assert total(after) < total(before)
    assert "copies" not in before


def total(plan):
    return sum(entry["bytes"] for entry in plan.values())


def test_table(planned):
    first, *rest, last = planned[1]
    assert first.split() == ["as", "traced", "fused"]
    assert {line.split("  ")[0] for line in rest} >= {*CALLED, "elementwise", "all"}
    assert last == "GB per image"
