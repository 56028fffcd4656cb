import json

import pytest

from sda_fast import bench
from sda_fast.errors import SdaError

NUMBERS = ("parity_mean_abs", "reference_seconds_per_image", "seconds_per_image", "speedup")


@pytest.fixture
def small(tiny, monkeypatch):
    """A tiny random ADM in place of the shipped one."""
    monkeypatch.setattr(bench, "weights_path", lambda name: tiny.adm)


def test_a_row_of_figures(small):
    row = bench.bench_projection("photos", 2, 1, "cpu")
    assert json.loads(json.dumps(row)) == row
    told = {"benchmark": "projection", "preset": "photos", "images": 2, "repeats": 1, "unit": "s"}
    assert row.items() >= told.items()
    assert all(row[name] > 0 for name in NUMBERS[1:])
    assert row["parity_mean_abs"] <= bench.PARITY
    assert row["speedup"] == pytest.approx(row["reference_seconds_per_image"] / row["seconds_per_image"])
    assert row["device"]
    assert row["threads"] >= 1


@pytest.mark.parametrize("break_it", ["limit", "result", "nan"])
def test_no_figures_without_parity(small, monkeypatch, cli, break_it):
    project = bench.Projector.__call__
    if break_it == "limit":
        monkeypatch.setattr(bench, "PARITY", -1.0)
    else:
        error = float("nan") if break_it == "nan" else 1e-3
        monkeypatch.setattr(bench.Projector, "__call__", lambda self, x, noise: project(self, x, noise) + error)
    monkeypatch.setattr(bench, "_interleaved", lambda *_: pytest.fail("timed"))
    said = cli("bench", "--images", 2, "--repeats", 1, "--json")
    assert (said.code, said.out) == (2, "")
    assert "the projections differ by" in said.err
    assert "no time is reported" in said.err


def test_wrong_options():
    with pytest.raises(SdaError, match="preset 'imagenet' is not known"):
        bench.bench_projection("imagenet", 1, 1, "cpu")
    for images, repeats in ((0, 1), (1, 0)):
        with pytest.raises(SdaError, match="must be at least 1"):
            bench.bench_projection("photos", images, repeats, "cpu")


def test_the_shipped_model(cli):
    said = cli("bench", "--images", 3, "--repeats", 1)
    assert said.code == 0, said.err
    assert said.out.startswith("published algorithm ")
    assert "x (parity: mean difference " in said.out
