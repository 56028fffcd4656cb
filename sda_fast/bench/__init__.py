"""Measurements against the published algorithm, in one run and only after results agree."""

from sda_fast.bench.models import PRESETS, TINY, architecture, fake_step, load_model, make_step, random_model
from sda_fast.bench.projection import bench_projection
from sda_fast.bench.step import bench_step, step_ledger

__all__ = [
    "PRESETS",
    "TINY",
    "architecture",
    "bench_projection",
    "bench_step",
    "fake_step",
    "load_model",
    "make_step",
    "random_model",
    "step_ledger",
]
