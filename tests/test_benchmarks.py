"""The harness times only what is right; every benchmark, the plots and the calls for the sanitizers run on the CPU."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("bench_*.py"))

FAKE = """
import torch
from harness import Case, main

def cases(device, tiny):
    x = torch.ones(1000)
    yield Case("fake", "plain", [1000], "float32", "contiguous", lambda: x * 2, 8000, lambda: {error}, 1e-3,
               baseline=lambda: x * 2, flops=1000)

main(cases)
"""


def run(script, *arguments, **kwargs):
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)


def fake(folder, error, *arguments):
    script = folder / "bench_fake.py"
    script.write_text(f"import sys; sys.path.append({str(FOLDER)!r})" + FAKE.format(error=error))
    return run(script, "--output", folder / "rows", *arguments)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The folder with the rows of every benchmark at tiny shapes."""
    folder = tmp_path_factory.mktemp("rows")
    for script in SCRIPTS:
        done = run(script, "--tiny", "--threads", 1, "--output", folder)
        assert done.returncode == 0, f"{script.name}\n{done.stdout}{done.stderr}"
        assert "of copy)" in done.stdout
    return folder


def test_a_right_result_is_timed(tmp_path):
    done = fake(tmp_path, "1e-4", "--repeats", 5, "--threads", 1)
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, (tmp_path / "rows" / "fake.jsonl").read_text().splitlines())
    assert row["p20"] <= row["p50"] <= row["p80"]
    assert row["gb_per_s"] == pytest.approx(8000 / row["p50"] / 1e6)
    assert row["tflop_per_s"] == pytest.approx(1000 / row["p50"] / 1e9)
    assert row["fraction_of_copy"] == pytest.approx(row["gb_per_s"] / row["copy_gb_per_s"])
    assert 0 < row["speedup_p20"] <= row["speedup"] <= row["speedup_p80"]
    assert row.items() >= {"unit": "ms", "repeats": 5, "threads": 1, "error": 1e-4, "cuda": None}.items()
    assert row["device"]
    assert row["torch"]
    assert "x plain (" in done.stdout
    assert "error 1.0e-04, allowed 1.0e-03" in done.stdout


def test_a_speedup_is_that_of_neighbours(monkeypatch):
    """A machine that is twice as slow during some repeats has no part in it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    harness = importlib.import_module("harness")
    assert harness.ratios([1.0, 2.0, 4.0], [5.0, 10.0, 20.0]) == [5.0, 5.0, 5.0]


def test_calls_take_turns(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    harness = importlib.import_module("harness")
    called = []
    times = harness.interleaved([lambda: called.append("a"), lambda: called.append("b")], "cpu", 3)
    assert "".join(called) == "ab" + "abbaab"
    assert [len(taken) for taken in times] == [3, 3]


@pytest.mark.parametrize("error", ["2e-3", "float('nan')"])
def test_a_wrong_result_is_not(tmp_path, error):
    done = fake(tmp_path, error, "--tiny")
    assert done.returncode == 1, done.stderr
    assert "PARITY FAILED" in done.stdout
    assert "x plain" not in done.stdout
    (row,) = map(json.loads, (tmp_path / "rows" / "fake.jsonl").read_text().splitlines())
    assert not {"p50", "gb_per_s", "speedup"} & set(row)


def test_repeats_stop_in_time(tmp_path):
    done = fake(tmp_path, "0.0", "--repeats", 1000, "--seconds", 0)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "rows" / "fake.jsonl").read_text())["repeats"] == 3


def test_every_benchmark_runs(rows):
    for script in SCRIPTS:
        operator = script.stem.removeprefix("bench_")
        written = [json.loads(line) for line in (rows / f"{operator}.jsonl").read_text().splitlines()]
        assert written
        assert all(row["benchmark"] == operator and row["speedup"] > 0 for row in written)


def test_plots(rows, tmp_path):
    fake(tmp_path, "2e-3", "--tiny")
    for folder in (rows, tmp_path / "rows"):
        done = run(FOLDER / "plot.py", folder, "--output", tmp_path / "plots")
        assert done.returncode == 0, done.stderr
        for file in folder.glob("*.jsonl"):
            assert (tmp_path / "plots" / f"{file.stem}.png").read_bytes().startswith(b"\x89PNG")
    done = run(FOLDER / "plot.py", tmp_path / "plots")
    assert done.returncode == 1
    assert "holds no *.jsonl" in done.stderr


def test_the_calls_for_the_sanitizers():
    done = run(FOLDER / "sanitize.py", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "nothing above was sanitised" in done.stdout
    for script in SCRIPTS:
        assert f"called {script.stem.removeprefix('bench_')} " in done.stdout
