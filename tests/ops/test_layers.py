"""One name per operator in every layer, or a stated reason for its absence; sources that know no framework."""

import re
from pathlib import Path

import pytest
import torch

from sda_fast import _core, ops

ROOT = Path(__file__).parents[2]

# Where an operator lives, as a pattern of file names.
LAYERS = {
    "ops": "sda_fast/ops/{}.py",
    "reference": "sda_fast/reference/{}.py",
    "kernels": "kernels/{}.py",
    "csrc/cpu": "csrc/cpu/{}.cpp",
    "csrc/cuda": "csrc/cuda/{}.cu",
    "tests": "tests/ops/test_{}.py",
    "benchmarks": "benchmarks/bench_{}.py",
}
# Versions that do not exist, with the reason.
ABSENT = {
    ("csrc/cpu", "modulate"): "PyTorch's own layer norm and elementwise operations are vectorised",
    ("csrc/cuda", "modulate"): "a single pass over rows, which Triton expresses fully",
    ("csrc/cuda", "group_norm_silu"): "only where it measures faster than Triton on a device",
    ("kernels", "winograd_convolution"): "tensor cores gain more from the direct convolution",
    ("csrc/cuda", "winograd_convolution"): "tensor cores gain more from the direct convolution",
    ("csrc/cuda", "to_uint8"): "a single elementwise pass off the loop: Triton's serves",
}
# Files that hold something else than an operator of their name, or an operator under another name.
OTHER_NAMES = {"philox": "philox_normal"}  # reference/philox.py
# Files that hold a part of one operator, or of several.
PARTS = {f"group_norm_silu_{part}" for part in ("backward", "calls", "channels_last", "contiguous", "tiles")}
PARTS |= {"guidance_calls", "rows"}
# Public operators without files of their own: they live with another one.
TOGETHER = {"gate_residual": "modulate"}
NO_OPERATORS = {"BACKENDS", "backend"}

PUBLIC = set(ops.__all__) - NO_OPERATORS
OPERATORS = {TOGETHER.get(name, name) for name in PUBLIC}


def names(layer: str) -> set[str]:
    folder, file = LAYERS[layer].rsplit("/", 1)
    prefix, suffix = file.split("{}")
    found = {path.name for path in (ROOT / folder).glob(f"{prefix}*{suffix}") if not path.name.startswith("_")}
    return {name.removeprefix(prefix).removesuffix(suffix) for name in found} - PARTS


@pytest.mark.parametrize("layer", LAYERS)
def test_one_operator_one_name(layer):
    absent = {operator for where, operator in ABSENT if where == layer}
    expected = OPERATORS - absent
    if layer == "reference":  # it holds models and samplers too
        assert expected <= {OTHER_NAMES.get(name, name) for name in names(layer)}
    elif layer == "tests":
        assert expected == names(layer) - {"backend", "compilation", "emulator", "interpreter", "layers", "registered"}
    else:
        assert expected == names(layer)


def test_a_reason_is_given_only_for_what_is_absent():
    for layer, operator in ABSENT:
        assert operator not in names(layer)


def test_every_operator_is_registered_public_and_compiled():
    for name in PUBLIC:
        assert getattr(ops, name).__module__ == f"sda_fast.ops.{TOGETHER.get(name, name)}"
        assert hasattr(torch.ops.sda_fast, name)
    for operator in OPERATORS:
        if ("csrc/cpu", operator) not in ABSENT:
            assert hasattr(_core, f"{operator}_cpu")
        if ("csrc/cuda", operator) not in ABSENT:
            assert hasattr(_core, f"{operator}_cuda") == _core.cuda_built


def test_fusion_of_products_and_sums_is_stated(compilation):
    """Triton's own default is about to change, and with it the bits."""
    for operator, (kernel, _, _, options) in compilation.triton_kernels():
        assert "enable_fp_fusion" in options, (operator, kernel)


def test_every_kernel_can_be_compiled_for_the_table(compilation):
    assert {file for file, _ in compilation.triton_kernels()} - PARTS == names("kernels")


def test_sources_know_no_framework():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert len(sources) > 5
    for path in sources:
        if path.name != "bindings.cpp":
            assert not re.search(r"torch|ATen|pybind11|Python\.h", path.read_text()), path
