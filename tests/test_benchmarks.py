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


@pytest.fixture
def pipeline(monkeypatch, tmp_path, capsys):
    """call(*arguments) of a tiny pipeline in `tmp_path`: the exit status, what was printed, all rows so far."""
    monkeypatch.syspath_prepend(str(FOLDER))
    main = importlib.import_module("pipeline").main
    tiny = ["--device=cpu", "--tiny", "--engine=eager", "--images=4", "--batch-size=2"]

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["", *tiny, f"--work={tmp_path}", f"--output={tmp_path}", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        file = tmp_path / "pipeline.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return end.value.code, capsys.readouterr().out, rows

    return call


def test_the_pipeline_goes_on_in_the_next_call(pipeline, tmp_path):
    pytest.importorskip("diffusers", reason='needs pip install "sda-fast[vae]"')
    assert pipeline("--minutes=-1") == (0, "LEFT for another call: synthesize, align, evaluate\n", [])

    status, out, rows = pipeline()
    assert status == 0, out
    assert [row["stage"] for row in rows] == ["synthesize", "align", "evaluate"]
    for row in rows:
        assert row.items() >= {"benchmark": "pipeline", "tiny": True, "images": 4, "peak_bytes": None}.items()
        assert row["images_per_second"] == pytest.approx(4 / row["seconds"])
        assert "note" not in row
    for row, steps in zip(rows, ({"respacing": "2"}, {"start": 2}), strict=False):
        assert row["settings"].items() >= {"engine": "eager", "precision": "bf16", "batch_size": 2, **steps}.items()
    results = tmp_path / "tiny" / "results"
    assert [len(list((results / name).rglob("*.png"))) for name in ("synthetic", "projected")] == [4, 4]

    # What a kill inside `align` leaves: an image is missing, and the rows from there on.
    for lost in ("projected/class0/00003.png", "align.json", "evaluate.json"):
        (results / lost).unlink()
    status, out, rows = pipeline()
    assert status == 0, out
    assert [(row["stage"], row["images"]) for row in rows[3:]] == [("align", 1), ("evaluate", 4)]

    assert pipeline("--minutes=-1")[1].startswith("LEFT for another call: synthesize"), "all done: it begins anew"


def test_the_pipeline_without_diffusers(pipeline, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    status, out, rows = pipeline()
    assert status == 0, out
    assert [(row["stage"], row["images"]) for row in rows] == [("synthesize", 4), ("align", 4), ("evaluate", 4)]
    assert ["latents alone" in row.get("note", "") for row in rows] == [True, False, False]


def test_a_stage_of_the_pipeline_that_fails_has_no_figure(pipeline, tmp_path):
    pipeline("--minutes=-1")
    (tmp_path / "tiny" / "results" / "projected").mkdir()
    (tmp_path / "tiny" / "results" / "projected" / "foreign").touch()
    status, out, rows = pipeline()
    assert status == 1
    assert "align: FAILED: SdaError: --output" in out
    assert ["failed" in row for row in rows] == [False, True, True]
    assert not {"images", "seconds", "images_per_second"} & set(rows[1])
    assert pipeline()[1].startswith("align: FAILED"), "what is measured is not measured again"


def test_the_first_batch_is_set_apart(monkeypatch):
    """It waits for weights and compilation."""
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("pipeline")
    done = module.Done({}, images=6, finished=[90.0, 100.0, 100.5, 101.0, 101.5, 102.0])
    rates = {"images_per_second": 0.06, "images_per_second_after_first_batch": 2.0}
    assert module.figures(done, 100.0, batch_size=2) == {"images": 6, "seconds": 100.0, **rates}
    assert "images_per_second_after_first_batch" not in module.figures(done, 100.0, batch_size=6)
