import json
import re

import pytest
import torch

import sda_fast
from sda_fast.errors import SdaError
from sda_fast.photos.dataset import CLASSES
from sda_fast.stages.recipes import RECIPES

COMMANDS = (
    "checkpoints",
    "synthesize",
    "align",
    "finetune",
    "evaluate",
    "run",
    "demo",
    "photos",
    "train-photos",
    "bench",
    "doctor",
    "corrupt",
    "compare",
    "ablate",
    "report",
)
REPORTING = [command for command in COMMANDS if command != "train-photos"]


@pytest.fixture
def images(tmp_path, write_images):
    return write_images(tmp_path / "images", ["fog/3/ant/1.png", "fog/3/cow/2.jpg", "snow/1/cow/3.png"], size=(20, 24))


def test_help_lists_every_command(cli):
    said = cli("--help")
    assert said.code == 0
    listed = re.findall(r"^  ([a-z-]+)  ", said.out.partition("Commands:")[2], flags=re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)
    assert "--debug" in said.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(cli, command):
    said = cli(command, "--help")
    assert (said.code, said.err) == (0, "")
    assert f"sda-fast {command} [OPTIONS]" in said.out
    assert ("--json" in said.out) == (command in REPORTING)
    for option in re.findall(r"^  (?:-\w, )?(--[a-z-]+)(.*)", said.out, flags=re.MULTILINE):
        assert option[1].strip(), f"{option[0]} has no help"


def test_version(cli):
    said = cli("--version")
    assert (said.code, said.out, said.err) == (0, f"sda-fast {sda_fast.__version__}\n", "")


@pytest.mark.parametrize(("device", "workers"), [("cpu", 7), ("cuda:1", 1)])
def test_processes_of_the_demo(cli, tmp_path, monkeypatch, device, workers):
    """One per core, but of processes that share a GPU one is enough."""
    settings = []

    def pipeline(config, log):
        settings.append(config)
        raise SdaError("seen")

    monkeypatch.setattr("sda_fast.stages.pipeline.run", pipeline)
    monkeypatch.setattr("sda_fast.cli.commands._check_device", str)
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    for given in ((), ("--workers", 3)):
        assert "seen" in cli("demo", "-o", tmp_path / "demo", "--per-class", 1, "--device", device, *given).err
    assert [(s.device, s.workers) for s in settings] == [(device, workers), (device, 3)]


ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
def test_the_stages_one_after_the_other(tmp_path, cli, tiny, images, device):
    """Each command with --json prints one object and nothing else; without it, a sentence."""
    raw, aligned, tuned = tmp_path / "raw", tmp_path / "aligned", tmp_path / "tuned"
    dda, pure = tmp_path / "dda", tmp_path / "diffpure"
    quick = ("--respacing", "10", "--start", "3")
    commands = {
        f"6 images in {raw} (0 made now).": (
            *("synthesize", "--output", raw, "--dit", tiny.dit, "--per-class", 2),
            *("--respacing", 10, "--clip", "--cfg-scale", 1.5, "--batch-size", 4, "--seed", 3),
        ),
        f"6 images in {aligned} (0 projected now).": (
            *("align", "-i", raw, "-o", aligned, "--adm", tiny.adm, *quick),
            *("--norm", "batch", "--norm-group", 2, "--batch-size", 4, "--factor", 2, "--scale", 3),
        ),
        f"{tuned / 'model.safetensors'}: {RECIPES['photos'].epochs} epochs of 6 images.": (
            *("finetune", "-i", aligned, "-o", tuned, "--model", tiny.resnet, "--recipe", "photos"),
        ),
        f"3 images in {dda} (0 projected now).": ("align", "-i", images, "-o", dda, "--adm", tiny.adm, *quick),
        f"3 images in {pure} (0 projected now).": (
            *("align", "-i", images, "-o", pure, "--adm", tiny.adm, *quick, "--projection", "diffpure"),
        ),
    }
    for sentence, command in commands.items():
        command += ("--device", device)
        said = cli(*command, "--json")
        assert (said.code, said.err) == (0, "")
        assert isinstance(json.loads(said.out), dict)
        said = cli(*command)
        assert (said.code, said.out, said.err) == (0, f"{sentence}\n", "")

    options = ("--device", device, "--model", tiny.resnet, "--finetuned", tuned / "model.safetensors")
    options += ("--projection", f"dda={dda}")
    command = ("evaluate", "-i", images, "-o", tmp_path / "results", *options, "--projection", f"diffpure={pure}")
    said = cli(*command, "--json")
    assert (said.code, said.err) == (0, "")
    rows = json.loads(said.out)["rows"]
    assert [row["method"] for row in rows] == ["Source", "DiffPure", "DDA", "SDA"] * 2
    assert {(row["corruption"], row["severity"], row["images"]) for row in rows} == {("fog", 3, 2), ("snow", 1, 1)}
    said = cli(*command)
    assert said.code == 0
    assert "Accuracy of resnet in percent" in said.out
    chosen = ("--method", "sda", "--ensemble", "confidence", "--batch-size", 2)
    said = cli("evaluate", "-i", images, "-o", tmp_path / "one", *options, *chosen, "--json")
    assert [row["method"] for row in json.loads(said.out)["rows"]] == ["SDA"] * 2
    adapting = ("--method", "tent", "--method", "memo", "--batch-size", 2)
    said = cli("evaluate", "-i", images, "-o", tmp_path / "adapting", *options, *adapting, "--json")
    assert [row["method"] for row in json.loads(said.out)["rows"]] == ["Tent", "MEMO"] * 2


def test_classes_from_a_file_and_only_some_of_them(tmp_path, cli, tiny, pictures):
    (tmp_path / "names.txt").write_text("x\ny\n\nz\n")
    nameless = tiny.save("dit", "unnamed")
    options = ("--output", tmp_path / "out", "--dit", nameless, "--per-class", 1, "--respacing", 10)
    said = cli("synthesize", *options, "--classes", tmp_path / "names.txt", "--only", "z", "--only", "x")
    assert said.code == 0, said.err
    assert list(pictures(tmp_path / "out")) == ["x/00000.png", "z/00000.png"]


def test_photos(tmp_path, cli, pictures):
    pytest.importorskip("imagecorruptions", reason='needs pip install "sda-fast[photos]"')
    command = ("photos", "-o", tmp_path / "out", "--per-class", 1, "--severity", 3, "--corruption", "fog")
    said = cli(*command, "--json")
    assert (said.code, said.err) == (0, "")
    assert json.loads(said.out) == {"images": 2 * len(CLASSES), "output": str(tmp_path / "out")}
    expected = {f"{folder}/{name}/000.png" for folder in ("clean", "fog/3") for name in CLASSES}
    assert set(pictures(tmp_path / "out")) == expected
    assert cli(*command).out == f"{2 * len(CLASSES)} patches in {tmp_path / 'out'}.\n"


def test_doctor(cli):
    said = cli("doctor", "--json")
    assert (said.code, said.err) == (0, "")
    findings = json.loads(said.out)["findings"]
    lines = cli("doctor").out.splitlines()
    assert len(lines) == len(findings) > 4
    for line, finding in zip(lines, findings, strict=True):
        assert line.startswith("ok " if finding["works"] else "no ")
        assert finding["part"] in line
