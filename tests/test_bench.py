import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sda_fast import bench
from sda_fast.bench import baseline, measure, models, projection, step
from sda_fast.engines import eager
from sda_fast.errors import SdaError
from sda_fast.models import ADM

NUMBERS = ("parity_mean_abs", "reference_seconds_per_image", "seconds_per_image", "speedup")
ENGINES = Path(__file__).parents[1] / "benchmarks" / "engines.py"


@pytest.fixture
def small(tiny, monkeypatch):
    """A tiny random ADM in place of the shipped one."""
    for module in (projection, models):
        monkeypatch.setattr(module, "weights_path", lambda name: tiny.adm)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The machine's rates from small pieces."""
    monkeypatch.setattr(measure, "_SIDE", {"cpu": 512})
    monkeypatch.setattr(measure, "_COPIED", {"cpu": 2**20})


def test_a_row_of_figures(small):
    row = bench.bench_projection("photos", 2, 1, "cpu")
    assert json.loads(json.dumps(row)) == row
    told = {"benchmark": "projection", "preset": "photos", "images": 2, "repeats": 1, "unit": "s"}
    assert row.items() >= told.items()
    assert all(row[name] > 0 for name in NUMBERS[1:])
    assert row["parity_mean_abs"] <= projection.PARITY
    assert row["speedup"] == pytest.approx(row["reference_seconds_per_image"] / row["seconds_per_image"])
    assert row["device"]
    assert row["threads"] >= 1


def test_a_projection_on_another_engine(small):
    row = bench.bench_projection("photos", 2, 1, "cpu", "onnx")
    assert row["engine"] == "onnx"
    assert row["parity_bound"] == projection.PARITY
    ratio = row["eager_seconds_per_image"] / row["seconds_per_image"]
    assert row["speedup_over_eager"] == pytest.approx(ratio)


def test_a_projection_in_half_precision_is_held_to_autocast(small, monkeypatch):
    row = bench.bench_projection("photos", 2, 1, "cpu", precision="bf16")
    assert 0 < row["parity_mean_abs"] <= row["parity_bound"]
    monkeypatch.setattr(projection, "HALF_FACTOR", 1e-3)
    with pytest.raises(SdaError, match=r"differ by .* on average, more than .*: no time is reported"):
        bench.bench_projection("photos", 2, 1, "cpu", precision="bf16")


@pytest.mark.parametrize("break_it", ["limit", "result", "nan"])
def test_no_figures_without_parity(small, monkeypatch, cli, break_it):
    project = projection.Projector.__call__
    if break_it == "limit":
        monkeypatch.setattr(projection, "PARITY", -1.0)
    else:
        error = float("nan") if break_it == "nan" else 1e-3
        monkeypatch.setattr(projection.Projector, "__call__", lambda self, x, noise: project(self, x, noise) + error)
    monkeypatch.setattr(projection, "interleaved", lambda *_: pytest.fail("timed"))
    said = cli("bench", "--whole", "--batch", 2, "--repeats", 1, "--json")
    assert (said.code, said.out) == (2, "")
    assert "the projections differ by" in said.err
    assert "no time is reported" in said.err


def test_wrong_options():
    with pytest.raises(SdaError, match="--whole measures the preset photos, not 'imagenet'"):
        bench.bench_projection("imagenet", 1, 1, "cpu")
    with pytest.raises(SdaError, match="two images at least: --batch 1 is too small"):
        bench.bench_projection("photos", 1, 1, "cpu")
    with pytest.raises(SdaError, match="--repeats must be at least 1"):
        bench.bench_projection("photos", 2, 0, "cpu")


@pytest.mark.parametrize("option", [["--ledger"], ["--unguided"], ["--weights", "adm.pt"], ["--phase-convolutions"]])
def test_what_a_whole_projection_does_not_take(cli, option):
    said = cli("bench", "--whole", *option)
    assert said.code == 2
    assert "--whole times projections by the shipped model: leave out" in said.err


def test_the_shipped_model(cli):
    said = cli("bench", "--whole", "--batch", 3, "--repeats", 1)
    assert said.code == 0, said.err
    assert said.out.startswith("published algorithm ")
    assert "x (parity: mean difference " in said.out


@pytest.mark.parametrize(
    ("model", "precision", "guided"),
    [
        ("adm", "fp32", True),
        ("adm", "bf16", True),
        ("adm", "fp32", False),
        ("adm", "bf16", False),
        ("dit", "fp32", True),
        ("dit", "bf16", True),
    ],
)
def test_a_row_of_a_step(model, precision, guided):
    network = bench.random_model(*bench.TINY[model])
    row = bench.bench_step(network, "tiny", precision=precision, batch=2, guided=guided, repeats=1)
    assert json.loads(json.dumps(row)) == row
    name = "DiTStep" if model == "dit" else "GuidedStep" if guided else "UnguidedStep"
    told = {"benchmark": "step", "preset": "tiny", "step": name, "engine": "eager", "precision": precision, "batch": 2}
    assert row.items() >= (told | {"unit": "s", "repeats": 1, "cuda": None}).items()
    outputs = {"out", "cotangent", "through_network", "squares"} if name == "GuidedStep" else {"out"}
    assert set(row["parity"]) == outputs
    for parity in row["parity"].values():
        assert parity["error"] <= parity["bound"]
        assert (parity["bound"] == step.FP32_BOUND) == (precision == "fp32")
        assert parity["bound"] < 0.5
    assert row["speedup"] == pytest.approx(row["reference_seconds_per_image"] / row["seconds_per_image"])
    taken = 2 * row["seconds_per_image"]
    assert row["tflop_per_s"] == pytest.approx(row["flops"] / taken / 1e12)
    assert row["gb_per_s"] == pytest.approx(row["bytes"] / taken / 1e9)
    assert row["fraction_of_matmul"] == pytest.approx(row["tflop_per_s"] / row["matmul_tflop_per_s"])
    assert row["reference"].endswith("eager fp32, batch 2")


def test_a_profile(small, cli):
    """Seconds by kernel add up to about those of the step; without --profile there are none."""
    said = cli("bench", "--batch", 4, "--repeats", 1, "--profile", "--json")
    kernels = (row := json.loads(said.out))["kernels"]
    assert [k["seconds"] for k in kernels[:-1]] == sorted((k["seconds"] for k in kernels[:-1]), reverse=True)
    assert kernels[-1]["name"].endswith(" others")
    assert any("convolution" in k["name"] and k["calls"] > 10 for k in kernels)
    assert 0.3 < sum(k["seconds"] for k in kernels) / (4 * row["seconds_per_image"]) < 10
    text = cli("bench", "--batch", 1, "--repeats", 1, "--profile").out
    assert "by kernel, of one more run:" in text
    assert "convolution" in text
    assert "kernels" not in json.loads(cli("bench", "--repeats", 1, "--json").out)


def test_the_last_image_of_a_large_batch_is_compared(monkeypatch):
    run = eager.EagerProgram.run

    def wrong(self, *inputs):
        outputs = [output.clone() for output in run(self, *inputs)]
        outputs[0][-1] *= 1.01
        return tuple(outputs)

    network = bench.random_model(*bench.TINY["adm"])
    assert "failed" not in bench.bench_step(network, "tiny", batch=9, repeats=1)
    monkeypatch.setattr(eager.EagerProgram, "run", wrong)
    assert "differs from float32 in out" in bench.bench_step(network, "tiny", batch=9, repeats=1)["failed"]


@pytest.mark.parametrize("output", [0, 1, 2, 3])
@pytest.mark.parametrize("spoil", [lambda y: y * 1.001, lambda y: y * float("nan")], ids=["wrong", "nan"])
def test_no_time_of_a_wrong_step(monkeypatch, output, spoil):
    run = eager.EagerProgram.run

    def wrong(self, *inputs):
        outputs = list(run(self, *inputs))
        outputs[output] = spoil(outputs[output])
        return tuple(outputs)

    monkeypatch.setattr(eager.EagerProgram, "run", wrong)
    monkeypatch.setattr(step, "interleaved", lambda *_: pytest.fail("timed"))
    row = bench.bench_step(bench.random_model(*bench.TINY["adm"]), "tiny")
    name = ("out", "cotangent", "through_network", "squares")[output]
    assert row["failed"].startswith(f"the step differs from float32 in {name} by ")
    assert row["failed"].endswith("no time is reported")
    assert not {"seconds_per_image", "speedup", "tflop_per_s"} & set(row)


def test_a_failure_at_the_command_line(small, monkeypatch, cli, tmp_path):
    monkeypatch.setattr(step, "FP32_BOUND", 0.0)
    said = cli("bench", "--output", tmp_path / "rows.jsonl")
    assert (said.code, said.out) == (2, "")
    assert "no time is reported" in said.err
    assert "failed" in json.loads((tmp_path / "rows.jsonl").read_text())


def test_half_precision_may_not_be_worse_than_autocast(monkeypatch):
    """The bound comes from autocast's own error, measured in the same run."""
    plain, errors = baseline.plain_outputs, []

    def spy(*arguments):
        outputs = plain(*arguments)
        errors.append(outputs)
        return outputs

    monkeypatch.setattr(step, "plain_outputs", spy)
    row = bench.bench_step(bench.random_model(*bench.TINY["dit"]), "tiny", precision="bf16", repeats=1)
    (exact,), (autocast,) = errors
    error = ((autocast - exact).double().norm() / exact.double().norm()).item()
    assert row["parity"]["out"]["bound"] == pytest.approx(1.5 * error, rel=1e-6)
    assert 1e-4 < error < 0.1


def test_random_weights_carry_activations_and_gradients():
    for kind, config in bench.TINY.values():
        one, same, other = (bench.random_model(kind, config, seed) for seed in (0, 0, 1))
        weights = zip(*(model.state_dict().values() for model in (one, same, other)), strict=True)
        assert all(torch.equal(a, b) for a, b, _ in weights)
        assert any(not torch.equal(a, c) for a, c in zip(one.parameters(), other.parameters(), strict=True))
        assert all(parameter.any() for parameter in one.parameters())
        network = bench.make_step(one, "fp32")
        with torch.no_grad():
            outputs = dict(zip(network.outputs, network(*network.example(2)), strict=True))
        assert 0.2 < outputs["out"].std() < 5
        if kind is ADM:
            ratio = outputs["through_network"].std() / outputs["cotangent"].std()
            assert 0.1 < ratio < 10


def test_the_command(small, cli, tmp_path):
    rows = tmp_path / "new" / "rows.jsonl"
    said = cli("bench", "--repeats", 1, "--output", rows)
    assert said.code == 0, said.err
    assert said.out.startswith("GuidedStep of photos, eager, fp32, batch 1 (")
    assert "s/image and step (published UNet, eager fp32, batch 1)" in said.out
    said = cli("bench", "--unguided", "--precision", "bf16", "--repeats", 1, "--output", rows, "--json")
    assert said.code == 0, said.err
    first, second = map(json.loads, rows.read_text().splitlines())
    assert json.loads(said.out) == second
    assert (first["step"], first["weights"]) == ("GuidedStep", "shipped")
    assert (second["step"], second["precision"]) == ("UnguidedStep", "bf16")


def test_the_ledger(small, cli):
    said = cli("bench", "--ledger", "--precision", "bf16", "--batch", 2)
    assert said.code == 0, said.err
    assert "saved for backward" in said.out
    assert "floor here" in said.out
    row = json.loads(cli("bench", "--ledger", "--precision", "bf16", "--batch", 2, "--json").out)
    assert row["kernels"] == sum(moved["kernels"] for moved in row["moved"].values())
    flops = row["forward_flops"] + row["backward_flops"]
    assert row["floor_seconds"]["products"] == pytest.approx(flops / row["matmul_tflop_per_s"] / 1e12)
    assert row["floor_seconds"]["bytes"] == pytest.approx(row["bytes"] / row["copy_gb_per_s"] / 1e9)


def test_the_memory_of_a_call():
    def allocate():
        torch.ones(2**24)  # 64 MiB, which the system hands out and takes back

    peak = measure.host_peak(allocate)
    assert peak == pytest.approx(2**26, abs=2**22)  # Linux counts pages with a delay


@pytest.mark.parametrize("model", ["adm", "dit"])
def test_the_engines_of_make_gpu(tmp_path, model):
    """Every configuration once with tiny models; another call (of the quicker model) finds nothing left to do."""
    command = [sys.executable, ENGINES, "--model", model, "--device", "cpu", "--tiny", "--output", tmp_path]
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    for _ in range(1 if model == "adm" else 2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / f"engines-{model}-tiny.jsonl").read_text().splitlines()]
    changed = [("bf16", 1, True, "GuidedStep"), ("bf16", 1, False, "UnguidedStep")] if model == "adm" else []
    step = "GuidedStep" if model == "adm" else "DiTStep"
    told = [(row["precision"], row["batch"], row["phase_convolutions"], row["step"]) for row in rows]
    both = [("bf16", 1, False, step), ("fp16", 1, False, step)]
    assert told == [*both, *changed, ("bf16", 2, False, step), ("fp16", 2, False, step)]
    assert all(row["seconds_per_image"] > 0 for row in rows)
    assert len(done.stdout.splitlines()) == (6 if model == "adm" else 0)
