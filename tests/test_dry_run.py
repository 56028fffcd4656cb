import json
import re

import pytest
import torch

from sda_fast import dry_run
from sda_fast.bench.models import architecture
from sda_fast.dry_run import BACKWARD, free_bytes
from sda_fast.engines.ledger import flops
from sda_fast.models import load_classifier
from sda_fast.models.vae import VAE
from sda_fast.stages.recipes import RECIPES

IMAGES = [f"fog/3/{name}/{i}.png" for name in ("ant", "cow") for i in range(3)]
RUN = """
output = "{0}/out"
target = "{0}/target"
adm = "{1.adm}"
dit = "{1.dit}"
classifiers = {{ resnet = "{1.resnet}" }}
synthesize = {{ respacing = "10", per_class = 2, clip = true, batch_size = 6 }}
align = {{ respacing = "10", start = 5 }}
finetune = {{ recipe = "photos" }}
evaluate = {{ methods = ["source", "dda", "sda"] }}
"""


@pytest.fixture
def run(tmp_path, cli, tiny, write_images):
    """run("--dry-run", ..., old=new): the command on a file of `RUN`, texts replaced."""
    write_images(tmp_path / "target", IMAGES)

    def call(*options, changes=()):
        text = RUN.format(tmp_path, tiny)
        for old, new in changes:
            text = text.replace(old, new)
        (tmp_path / "run.toml").write_text(text)
        return cli("run", tmp_path / "run.toml", *options)

    return call


@pytest.fixture
def plan(run):
    def call(*options, changes=()):
        said = run("--dry-run", "--json", *options, changes=changes)
        assert (said.code, said.err) == (0, "")
        return {row["stage"]: row for row in json.loads(said.out)["stages"]}

    return call


def network(preset):
    kind, config = architecture(preset)
    with torch.device("meta"):
        model = kind(**config)
    model.config = config
    return model


def test_the_published_networks_cost_what_was_counted_on_the_originals():
    """TFLOP for one image: 50 guided steps of ADM-256, 250 steps of DiT-XL/2."""
    assert 50 * dry_run._step_flops(network("adm-256-uncond")) / 1e12 == pytest.approx(224.57, abs=0.01)
    # Less the conditioning, 0.45 GFLOP a step, which is computed once for all steps and not in the step.
    assert 250 * dry_run._step_flops(network("dit-xl-2-256")) / 1e12 == pytest.approx(59.31 - 250 * 0.45e-3, abs=0.01)


def test_the_published_vae_costs_what_was_counted():
    AutoencoderKL = pytest.importorskip("diffusers", reason='needs pip install "sda-fast[vae]"').AutoencoderKL

    channels = (128, 256, 512, 512)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        vae = VAE(AutoencoderKL(block_out_channels=channels, layers_per_block=2, latent_channels=4, **kinds))
    assert flops(vae.decode, torch.empty(1, 4, 32, 32, device="meta")) / 1e12 == pytest.approx(0.622, abs=1e-3)


def test_the_plan_by_hand(tmp_path, plan, tiny):
    rows = plan()
    out, target, epochs = tmp_path / "out", tmp_path / "target", RECIPES["photos"].epochs
    names = ["synthesize", "align", "finetune resnet on aligned images", "project (dda)", "evaluate resnet"]
    assert list(rows) == names
    raw, aligned, projected = out / "synthetic" / "raw", out / "synthetic" / "aligned", out / "projected" / "dda"
    reads = ["the DiT", raw, aligned, target, f"{target}, {projected}"]
    assert [row["reads"] for row in rows.values()] == list(map(str, reads))
    writes = [raw, aligned, out / "finetuned" / "aligned" / "resnet", projected, out / "evaluation" / "resnet"]
    assert [row["writes"] for row in rows.values()] == list(map(str, writes))
    assert [row["images"] for row in rows.values()] == [6, 6, epochs * 6, 6, 6]
    assert {row["done"] for row in rows.values()} == {0}
    assert {row["seconds"] for row in rows.values()} == {None}

    classifier = load_classifier(tiny.resnet)
    forward = flops(classifier, torch.empty(1, 3, 16, 16))
    assert rows[names[2]]["flops"] == epochs * 6 * (1 + BACKWARD) * forward
    assert rows[names[4]]["flops"] == 6 * (1 + 2 + 2) * forward  # source, dda, sda
    assert rows["align"]["flops"] == rows["project (dda)"]["flops"]
    assert rows["align"]["flops"] % (6 * 5) == 0
    assert rows["synthesize"]["flops"] % (6 * 10) == 0
    assert [rows[name]["bytes"] for name in ("synthesize", "align", "project (dda)")] == [6 * 16 * 16 * 3] * 3
    assert rows[names[2]]["bytes"] == 4 * sum(p.numel() for p in classifier.parameters())
    assert not out.exists()


def test_what_changes_the_cost(plan):
    rows = plan()
    twice = plan(changes=[("per_class = 2", "per_class = 4")])
    assert twice["synthesize"]["flops"] == 2 * rows["synthesize"]["flops"]
    guided = plan(changes=[("clip = true", "cfg_scale = 4.0")])
    assert guided["synthesize"]["flops"] == 2 * rows["synthesize"]["flops"]
    fewer = plan(changes=[("clip = true", 'only = ["ant"]'), ('["source", "dda", "sda"]', '["sda", "gda", "memo"]')])
    assert fewer["synthesize"]["images"] == fewer["align"]["images"] == 2
    assert fewer["evaluate resnet"]["flops"] > 10 * rows["evaluate resnet"]["flops"]


def test_what_is_done_is_told_and_nothing_is_touched(tmp_path, run, plan):
    done = run("--json")
    assert done.code == 0, done.err
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    rows = plan()
    assert all(row["done"] == row["images"] for row in rows.values())
    assert {row["flops"] + row["bytes"] for row in rows.values()} == {0}
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    (tmp_path / "out" / "projected" / "dda" / "fog/3/ant/1.png").unlink()
    (tmp_path / "out" / "synthetic" / "raw" / "bee" / "00001.png").write_bytes(b"cut")
    rows = plan()
    # Whether the torn image will be again what it was, and its projection good, only making it can tell.
    assert [row["images"] - row["done"] for row in rows.values()] == [1, 1, 0, 1, 0]

    (tmp_path / "target" / "fog/3/ant/1.png").unlink()  # then the rows of that corruption are of other images
    assert plan()["evaluate resnet"]["done"] == 0

    for changes in ([("start = 5", "start = 4")], [("clip = true", "clip = false")]):
        said = run("--dry-run", changes=changes)
        assert said.code == 2
        assert re.search(r"was made with (start|clip) = .*, this run has", said.err)
        # The real run says the same, after the names of the stages it came to.
        assert run(changes=changes).err.splitlines()[-1] == said.err.strip()


def test_an_output_that_cannot_be_used(tmp_path, run):
    (tmp_path / "file").write_text("")
    for output in ("file", "file/out"):
        said = run("--dry-run", changes=[("/out", f"/{output}")])
        assert said.code == 2
        assert "cannot be used (Not a directory): choose another one" in said.err
    foreign = tmp_path / "out" / "synthetic" / "raw"
    foreign.mkdir(parents=True)
    (foreign / "notes.txt").write_text("")
    assert "raw holds notes.txt but no manifest.json: use another --output" in run("--dry-run").err


def test_time_from_a_rate(plan, run):
    rows = plan("--rate", 2.5)
    for row in rows.values():
        assert row["seconds"] == pytest.approx(row["flops"] / 2.5e12)
        assert row["basis"] == "--rate 2.5 TFLOP/s"
    workers = plan("--rate", 2.5, changes=[("target =", "workers = 2\ntarget =")])
    assert workers["align"]["seconds"] == pytest.approx(rows["align"]["seconds"] / 2)
    assert workers["evaluate resnet"]["seconds"] == rows["evaluate resnet"]["seconds"]
    text = " ".join(run("--dry-run", "--rate", 2.5).out.split())
    assert "Time is an estimate: those FLOPs at --rate 2.5 TFLOP/s; 1 worker(s)" in text
    assert "Nothing was started or written." in text


def test_time_from_measured_rows(tmp_path, plan, run):
    """Of rows that fit step, network, engine, precision and kinds of convolution, the latest counts."""
    common = {"benchmark": "step", "engine": "eager", "precision": "fp32", "threads": 1, "batch": 8, "device": "chip"}
    photos = {**common, "preset": "photos", "step": "GuidedStep"}
    rates = [
        {**photos, "tflop_per_s": 1.0},
        {**photos, "tflop_per_s": 2.0},
        {**photos, "tflop_per_s": 3.0, "precision": "bf16"},
        {**photos, "tflop_per_s": 4.0, "engine": "inductor"},
        {**photos, "tflop_per_s": 5.0, "step": "UnguidedStep"},
        {**photos, "tflop_per_s": 6.0, "preset": "adm-256-uncond"},
        {**photos, "tflop_per_s": 7.0, "winograd": True},
        {**photos, "tflop_per_s": 8.0, "phase_convolutions": True},
        {**photos, "failed": "no time"},
        {"benchmark": "ledger"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rates))
    rows = plan("--rows", path)
    assert {row["seconds"] for row in rows.values()} == {None}, "no row is of the tiny network"
    said = run("--dry-run", "--rows", path)
    assert "No time is estimated" in said.out
    changes = [('adm = "', 'adm = "photos:adm" # "')]
    rows = plan("--rows", path, changes=changes)
    assert rows["align"]["seconds"] == pytest.approx(rows["align"]["flops"] / 2e12)
    assert rows["align"]["basis"] == "2 TFLOP/s, GuidedStep on eager in fp32, batch 8, chip, 1 thread(s)"
    assert rows["synthesize"]["seconds"] is rows["evaluate resnet"]["seconds"] is None
    phases = plan("--rows", path, changes=[*changes, ("align = {", "align = { phase_convolutions = true,")])
    assert phases["align"]["basis"].startswith("8 TFLOP/s, GuidedStep on eager in fp32, phase convolutions, batch 8")
    free = plan("--rows", path, changes=[*changes, ("align = {", "align = { jacobian_free = true,")])
    assert free["align"]["basis"].startswith("5 TFLOP/s, UnguidedStep on eager in fp32, batch 8")
    assert 1.9 < rows["align"]["flops"] / free["align"]["flops"] < 2.2
    text = " ".join(run("--dry-run", "--rows", path, changes=changes).out.split())
    assert "Without a rate: DiTStep of this network on eager in fp32, of which no row is; a classifier" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rate", 5), "--rate and --rows are for --dry-run: add it"),
        (("--dry-run", "--rate", 0), "--rate 0.0 is out of range: give the TFLOP/s of one process, above 0"),
        (("--dry-run", "--rate", 5, "--rows", "x"), "--rate and --rows exclude each other: give one of them"),
        (("--dry-run", "--rows", "none"), "--rows none cannot be read (No such file or directory)"),
        (("--dry-run", "--rows", __file__), "holds no rows of sda-fast bench ("),
        (("--dry-run", "--rows", "/dev/null"), "--rows /dev/null holds no measured step: sda-fast bench --output"),
    ],
)
def test_wrong_options(run, options, message):
    said = run(*options)
    assert said.code == 2
    assert message in said.err
    assert said.err.count("\n") == 1


def test_too_little_space_is_said(run, monkeypatch, tmp_path):
    assert free_bytes(tmp_path / "not" / "there") > 0
    assert "WHICH IS NOT ENOUGH" not in run("--dry-run").out
    monkeypatch.setattr(dry_run, "free_bytes", lambda folder: 1000)
    assert "0.00 MB are free, WHICH IS NOT ENOUGH" in " ".join(run("--dry-run").out.split())
