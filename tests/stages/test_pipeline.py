import json
import shutil
import time
from pathlib import Path

import pytest

from sda_fast.errors import SdaError
from sda_fast.stages import align, evaluate, finetune, pipeline, synthesize
from sda_fast.stages.config import read_config
from sda_fast.stages.manifest import BEFORE
from sda_fast.stages.pipeline import UNALIGNED

METHODS = ["Source", "DiffPure", "DDA", "SDA", UNALIGNED]
CORRUPTIONS = [("clean", 0), ("fog", 3), ("snow", 3)]
IMAGES = [
    f"{folder}/{name}/{i}.png" for folder in ("clean", "fog/3", "snow/3") for name in ("ant", "cow") for i in (1, 2)
]


@pytest.fixture
def config(tmp_path, tiny, write_images):
    """The text of a TOML file that runs everything on a dozen images."""
    write_images(tmp_path / "target", IMAGES, size=(20, 24))
    return f"""
output = "{tmp_path / "out"}"
target = "{tmp_path / "target"}"
adm = "{tiny.adm}"
dit = "{tiny.dit}"
[classifiers]
resnet = "{tiny.resnet}"
convnext = "{tiny.convnext}"
[synthesize]
respacing = "10"
per_class = 2
clip = true
[align]
respacing = "10"
start = 5
[diffpure]
respacing = "10"
start = 3
[finetune]
recipe = "photos"
[evaluate]
ablation = true
"""


@pytest.fixture
def run(tmp_path, cli):
    def run(text, *options):
        (tmp_path / "run.toml").write_text(text)
        return cli("run", tmp_path / "run.toml", *options)

    return run


@pytest.fixture
def no_work(monkeypatch):
    """From here on, whoever computes anything fails the test."""

    def start():
        for module, name in (
            (synthesize, "_make_work"),
            (align, "_make_work"),
            (finetune, "train"),
            (evaluate, "_outcomes"),
        ):
            monkeypatch.setattr(module, name, lambda *_: pytest.fail("computed again"))

    return start


def test_a_whole_run_and_a_second_one(tmp_path, config, run, pictures, no_work):
    said = run(config, "--json")
    assert said.code == 0, said.err
    result = json.loads(said.out)
    check_rows(result["rows"])
    out = tmp_path / "out"
    synthetic = {f"{name}/0000{i}.png" for name in ("ant", "bee", "cow") for i in (0, 1)}
    assert set(pictures(out / "synthetic" / "raw")) == set(pictures(out / "synthetic" / "aligned")) == synthetic
    for kind in ("dda", "diffpure"):
        assert set(pictures(out / "projected" / kind)) == set(IMAGES)
    for name in ("resnet", "convnext"):
        for data in ("aligned", "raw"):
            assert (out / "finetuned" / data / name / "model.safetensors").is_file()
        for folder in (name, f"{name}-unaligned"):
            assert (out / "evaluation" / folder / "results.json").is_file()
    stages = [line.removeprefix("== ") for line in said.err.splitlines()]
    assert stages == [
        "synthesize",
        "align",
        "finetune resnet on aligned images",
        "finetune convnext on aligned images",
        "finetune resnet on raw images",
        "finetune convnext on raw images",
        "project (dda)",
        "project (diffpure)",
        "evaluate resnet",
        "evaluate resnet, not aligned",
        "evaluate convnext",
        "evaluate convnext, not aligned",
    ]
    check_report(out, result, config)

    times = {path: path.stat().st_mtime_ns for path in (*out.rglob("*/*.png"), *out.rglob("*.safetensors"))}
    no_work()
    started = time.monotonic()
    again = run(config)
    assert again.code == 0, again.err
    assert time.monotonic() - started < 30
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert "Accuracy of resnet" in again.out
    assert str(out / "report.html") in again.out
    assert json.loads((out / "results.json").read_text())["rows"] == result["rows"]

    for path in out.rglob("manifest.json"):
        path.write_text(json.dumps(earlier(json.loads(path.read_text()))))
    upgraded = run(config)
    assert upgraded.code == 0, upgraded.err
    assert {path: path.stat().st_mtime_ns for path in times} == times


def earlier(manifest):
    """What stands in a manifest, but for the settings that earlier versions did not have."""
    if not isinstance(manifest, dict):
        return manifest
    kept = {name: earlier(value) for name, value in manifest.items() if name not in BEFORE.keys() - {"format"}}
    return {name: value for name, value in kept.items() if (name, value) != ("format", "png")}


def check_rows(rows):
    cells = {(row["model"], row["method"], row["corruption"], row["severity"]) for row in rows}
    assert len(cells) == len(rows)
    assert cells == {(m, n, *c) for m in ("resnet", "convnext") for n in METHODS for c in CORRUPTIONS}
    assert all(row["images"] == len(row["outcomes"]) == 4 for row in rows)


def check_report(out, result, config):
    assert set(result["files"]) == {"report", "pictures", "bars", "table", "rows"}
    for path in (*result["files"].values(), out / "results.csv"):
        assert Path(path).stat().st_size > 0
    written = json.loads((out / "results.json").read_text())
    assert written["rows"] == result["rows"]
    assert written["settings"]["align"]["start"] == 5
    assert set(written["seconds"]) >= {"synthesize", "project (dda)", "evaluate resnet"}
    table = (out / "results.md").read_text()
    assert table.startswith("Accuracy in percent, mean over 2 corruptions, severity 3\n")
    assert "not aligned" in table
    assert "sda-fast run" in (out / "report.html").read_text()


def test_an_interrupted_run_goes_on(tmp_path, config, run, pictures, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "_outcomes", interrupt)
        said = run(config)
    assert said.code == 130
    assert said.err.splitlines()[-1] == "sda-fast: interrupted; the same command goes on from here."
    before = pictures(tmp_path / "out")
    said = run(config, "--json")
    assert said.code == 0, said.err
    check_rows(json.loads(said.out)["rows"])
    after = pictures(tmp_path / "out")
    assert before.items() <= after.items()
    assert set(after) - set(before) == {"bars.png", "grid.png"}


def test_synthetic_images_that_the_settings_do_not_ask_for_are_refused(tmp_path, config, run, pictures):
    """Fine-tuning takes what is in the folder: it would not be what the settings say."""
    said = run(config)
    assert said.code == 0, said.err
    made = pictures(tmp_path / "out")
    fewer = config.replace("per_class = 2", "per_class = 1")
    for options in ([], ["--dry-run"]):
        said = run(fewer, *options)
        assert said.code == 2
        message = "raw holds 3 images that these settings do not ask for, such as ant/00001.png: give"
        assert message in said.err.splitlines()[-1]
    assert pictures(tmp_path / "out") == made
    shutil.rmtree(tmp_path / "out" / "synthetic" / "raw")
    said = run(fewer)
    assert said.code == 2
    assert "aligned holds 3 images that these settings do not ask for, such as ant/00001.png: what they" in said.err
    assert "aligned holds 3 images that" in run(fewer, "--dry-run").err


def test_methods_that_need_no_adaptation_synthesize_nothing(tmp_path, config, run):
    config = config.replace("ablation = true", 'methods = ["dda", "source"]')
    said = run(config, "--json")
    assert said.code == 0, said.err
    rows = json.loads(said.out)["rows"]
    assert list(dict.fromkeys(row["method"] for row in rows)) == ["DDA", "Source"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["evaluation", "projected"]
    assert [path.name for path in (tmp_path / "out" / "projected").iterdir()] == ["dda"]


def test_methods_that_need_diffusion_models_get_the_runs(tmp_path, config, run):
    options = "options = {gda = {views = 2, start = 2}, diffusion_tta = {updates = 1, pairs = 2}}"
    config = config.replace("ablation = true", f'methods = ["gda", "diffusion_tta"]\n{options}')
    said = run(config, "--json")
    assert said.code == 0, said.err
    assert list(dict.fromkeys(row["method"] for row in json.loads(said.out)["rows"])) == ["GDA", "Diffusion-TTA"]
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == ["evaluation"]
    settings = json.loads((tmp_path / "out" / "evaluation" / "resnet" / "manifest.json").read_text())["settings"]
    assert set(settings["networks"]) == {"adm", "dit"}
    assert settings["options"]["gda"] == {"views": 2, "start": 2}


def test_classes_of_the_dit_that_a_classifier_does_not_know(tmp_path, config, run, tiny):
    foreign = tiny.save("dit", "foreign", names=("ant", "bee", "dog"))
    said = run(config.replace(str(tiny.dit), str(foreign)))
    assert said.code == 2
    assert "class 'dog' of DiT " in said.err
    assert "is none of resnet's: give models of the same classes" in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[align]", '[align]\nprojection = "diffpure"', "[align] projection = 'diffpure' must be 'dda'"),
        ("[diffpure]", '[diffpure]\nprojection = "dda"', "[diffpure] projection = 'dda' must be 'diffpure'"),
        ("ablation = true", 'mode = "mean"', "[evaluate] mode = 'mean' is not known; choose one of sum"),
        ("ablation = true", "batch_size = 0", "[evaluate] batch_size = 0 is out of range"),
        ("ablation = true", 'methods = ["magic"]', "method 'magic' is not known"),
        ('recipe = "photos"', 'recipe = "photo"', "recipe 'photo' is not known"),
        ("per_class = 2", "per_class = 0", "--per-class 0 is out of range"),
        ("[classifiers]", "workers = 0\n[classifiers]", "--workers 0 is out of range"),
        ("[classifiers]", 'device = "abacus"\n[classifiers]', "device 'abacus' cannot be used on this machine"),
        ("resnet = ", 'third = "none.safetensors"\nresnet = ', "checkpoint none.safetensors does not exist"),
        ("target = ", 'target = "nowhere" #', "target nowhere does not exist"),
        ("start = 5", "start = 50", "start=50 is out of range"),
        ("[synthesize]", '[synthesize]\nonly = ["dog"]', "class 'dog' is none of the model's 3"),
        ("[synthesize]", '[synthesize]\nclasses = "none.txt"', "class list none.txt cannot be read"),
        ("ablation = true", "seed = 1\n[evaluate.options.memo]", "options are given for method memo, which is"),
        ("ablation = true", 'methods = ["memo"]\noptions = {memo = {view = 2}}', "method memo: got an unexpected"),
        ("ablation = true", 'methods = ["gda"]\noptions = {gda = {start = 99}}', "start=99 is out of range"),
        ("ablation = true", "methods = []", "[evaluate] methods is empty: name at least one, or leave it out"),
        ("resnet = ", '"../resnet" = ', "classifiers: '../resnet' cannot name a folder: leave out slashes"),
        ("resnet = ", '".." = ', "classifiers: '..' cannot name a folder: leave out slashes"),
        ("start = 5", "strat = 5", "[align]: unknown key 'strat'; did you mean start?"),
    ],
)
def test_what_would_fail_later_fails_at_once(tmp_path, config, run, old, new, message):
    said = run(config.replace(old, new, 1))
    assert run(config.replace(old, new, 1), "--dry-run").err == said.err
    assert said.code == 2
    assert message in said.err.splitlines()[-1]
    assert said.out == ""
    assert "Traceback" not in said.err
    assert not (tmp_path / "out").exists()


def test_an_output_inside_the_target_is_refused_at_once(tmp_path, config, run):
    inside = config.replace(f'output = "{tmp_path / "out"}"', f'output = "{tmp_path / "target" / "out"}"')
    for options in ([], ["--dry-run"]):
        said = run(inside, *options)
        assert said.code == 2
        assert "target/out lies in target " in said.err
        assert "a second call would take results for images; move it" in said.err
    assert not (tmp_path / "target" / "out").exists()


def test_target_classes_the_models_do_not_know(config, run, tmp_path, write_images):
    write_images(tmp_path / "target", ["fog/3/dog/1.png"])
    said = run(config)
    assert said.code == 2
    assert "the folder dog of " in said.err
    assert not (tmp_path / "out").exists()


def test_no_classifier_at_all(tmp_path, config):
    path = tmp_path / "run.toml"
    text = config.replace("[classifiers]", "classifiers = {}\n[x]")
    path.write_text("\n".join(line for line in text.splitlines() if not line.startswith(("[x]", "resnet", "convnext"))))
    with pytest.raises(SdaError, match="classifiers is empty: name at least one"):
        pipeline.run(read_config(path))
