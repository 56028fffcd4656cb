import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from sda_fast.data import read_image
from sda_fast.errors import SdaError
from sda_fast.methods import METHODS
from sda_fast.report.approximations import JACOBIAN_FREE
from sda_fast.stages.config import read_config
from sda_fast.stages.evaluate import evaluate
from sda_fast.studies import compare as module
from sda_fast.studies import scoring
from sda_fast.studies.config import CompareSettings, chosen_methods, read_study

CELLS = [("fog", 3), ("snow", 3)]
MODELS = ("resnet", "convnext")
QUICK = ("--method", "source", "--method", "tent", "--method", "memo")


def by_cell(rows):
    keys = ("method", "model", "corruption", "severity", "stream")
    cells = {tuple(row[key] for key in keys): row for row in rows}
    assert len(cells) == len(rows)
    return cells


def outcomes(rows):
    return {cell: row["outcomes"] for cell, row in by_cell(rows).items()}


def forbid(monkeypatch):
    monkeypatch.setattr(scoring, "_see", lambda *_: pytest.fail("computed again"))


def test_all_methods_on_all_streams(tmp_path, study, call, monkeypatch):
    rows = call("compare", study)
    cells = by_cell(rows)
    streams = {row["stream"] for row in rows} - {"any"}
    assert len(streams) == 20
    expected = {
        (title, model, *cell, stream)
        for title in ("Source", "Tent", "MEMO", "Diffusion-TTA", "DiffPure", "GDA", "DDA", "SDA")
        for model in MODELS
        for cell in CELLS
        for stream in (streams if title == "Tent" else {"any"})
    }
    assert cells.keys() == expected
    for row in rows:
        assert row["images"] == len(row["outcomes"]) == 4
        assert row["seconds_per_image"] > 0
        kinds = {type(row[key]) for key in ("mixed_classes", "mixed_corruptions", "batch_size", "reset")}
        assert (kinds == {type(None)}) == (row["method"] != "Tent")

    out = tmp_path / "out"
    check_same_as_evaluate(out, tmp_path / "target", study, cells)
    written = json.loads((out / "compare" / "results.json").read_text())
    assert written["rows"] == rows
    assert written["command"].startswith("sda-fast compare ")
    assert written["settings"]["align"]["start"] == 2
    assert {"torch", "sda-fast"} <= written["environment"].keys()
    made = {"project (dda)": 12, "project (diffpure)": 12, "synthesize": 9, "align": 9}
    assert {stage: written["seconds"][stage]["images"] for stage in made} == made
    assert written["seconds"]["finetune resnet on aligned"]["images"] == 9
    text = (out / "compare" / "results.md").read_text()
    for caption in ("tables 1 and 2", "table 8", "table 3", "Time per image", "Paired comparisons"):
        assert caption in text
    assert (out / "compare" / "comparisons.csv").read_text().count("exact McNemar") == 2 * 2 * 13
    assert (out / "compare" / "streams.csv").read_text().count("\n") == 1 + 2 * 20 * 2

    forbid(monkeypatch)
    assert call("compare", study) == rows
    assert call("compare", study, "--method", "sda") == [row for row in rows if row["method"] == "SDA"]


def check_same_as_evaluate(out, target, text, cells):
    """`evaluate` shows class after class, a corruption after the other, and resets in between."""
    (out.parent / "study.toml").write_text(text)
    config = read_study(out.parent / "study.toml")
    options = {"memo": {"views": 2}, "tent": {"steps": 2}, "gda": {"views": 2, "start": 1}}
    options["diffusion_tta"] = {"updates": 1, "pairs": 2}
    rows = evaluate(
        target,
        out.parent / "evaluated",
        config.classifiers["resnet"],
        out / "finetuned" / "aligned" / "resnet" / "model.safetensors",
        {kind: out / "projected" / kind for kind in ("dda", "diffpure")},
        list(METHODS),
        name="resnet",
        networks={"adm": config.adm, "dit": config.dit},
        options=options,
    )
    stream = "class by class, corruptions apart, batches of 64, reset per corruption"
    for row in rows:
        if row["severity"]:
            cell = tuple(row[key] for key in ("method", "model", "corruption", "severity"))
            assert cells[(*cell, stream if row["method"] == "Tent" else "any")].items() >= row.items()


def test_a_method_that_an_option_makes_learn_is_shown_streams(study, call):
    text = study.replace("[compare]\n", "[compare]\nbatch_sizes = [4]\nmixed_corruptions = [true]\n")
    rows = call("compare", text, "--method", "memo", "--option", "memo.leak_optimizer_state=true")
    assert {(row["mixed_classes"], row["reset"]) for row in rows} == {
        (mixed, reset) for mixed in (True, False) for reset in ("continual", "batch")
    }
    assert len(rows) == 4 * len(MODELS) * len(CELLS)


def test_killed_it_goes_on_to_the_same_rows(tmp_path, study, call, monkeypatch):
    text = study.replace("[compare]\n", '[compare]\nmethods = ["source", "tent", "memo"]\nbatch_sizes = [4]\n')
    whole = outcomes(call("compare", text, "--output", tmp_path / "whole"))
    see, calls = scoring._see, []

    def killed(*arguments):
        calls.append(None)
        if len(calls) % 9 == 0:
            raise KeyboardInterrupt
        see(*arguments)

    monkeypatch.setattr(scoring, "_see", killed)
    (tmp_path / "study.toml").write_text(text)
    config = read_study(tmp_path / "study.toml")
    kills = 0
    while True:
        try:
            rows = module.compare(config, quiet=True).rows
            break
        except KeyboardInterrupt:
            kills += 1
    assert outcomes(rows) == whole
    jobs = len(MODELS) * (2 * 2 + 2 * 4 + 6)  # by corruption: Source, MEMO, 4 streams of Tent; 6 streams hold both
    assert kills == (jobs + kills) // 9 > 2  # nothing was done twice


def test_of_a_slow_method_what_was_done_is_kept_image_by_image(tmp_path, study, call, monkeypatch):
    monkeypatch.setattr(scoring, "SAVE_EVERY", -1.0)
    text = study.replace("[compare]\n", '[compare]\nmethods = ["memo"]\n')
    whole = outcomes(call("compare", text, "--output", tmp_path / "whole"))
    write, seen = scoring.write_json, []

    def interrupted(value, path):
        write(value, path)
        seen.append(None)
        if len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "write_json", interrupted)
    (tmp_path / "study.toml").write_text(text)
    with pytest.raises(KeyboardInterrupt):
        module.compare(read_study(tmp_path / "study.toml"), quiet=True)
    (kept,) = (tmp_path / "out").rglob("any/fog/3.json")
    assert json.loads(kept.read_text())["timed"] == 3
    monkeypatch.setattr(scoring, "write_json", write)
    assert outcomes(call("compare", text)) == whole
    again = json.loads(kept.read_text())
    assert (again["timed"], len(again["right"])) == (4, 4)


def test_further_images_leave_what_is_known_of_the_others(tmp_path, study, call, write_images):
    study = study.replace("[compare]\n", '[compare]\nbatch_sizes = [4]\nresets = ["continual"]\n')
    before = call("compare", study, *QUICK)
    write_images(tmp_path / "target", ["fog/3/bee/1.png", "snow/3/bee/1.png"], size=(20, 24))
    after = by_cell(call("compare", study, *QUICK))
    for cell, row in by_cell(before).items():
        if row["stream"] == "any":
            both = row["outcomes"], after[cell]["outcomes"]
            assert both[1][:2] + both[1][3:] == both[0]  # "bee" lies between "ant" and "cow"
            (kept,) = (tmp_path / "out/compare" / row["model"] / row["method"].lower()).rglob(f"{row['corruption']}/*")
            assert json.loads(kept.read_text())["timed"] == 5
    rows = call("compare", study, *QUICK, "--output", tmp_path / "fresh")
    assert outcomes(rows) == {cell: row["outcomes"] for cell, row in after.items()}


@pytest.mark.parametrize("folder", ["target", "out/projected/dda"])
def test_a_changed_image_is_seen_again(tmp_path, study, call, folder):
    """A method that takes images one by one sees that one again, one that learns from its stream the whole stream."""
    study = study.replace("[compare]\n", '[compare]\nbatch_sizes = [4]\nresets = ["continual"]\n')
    options = (*QUICK, "--method", "dda")
    call("compare", study, *options)
    rows = tmp_path / "out/compare/resnet"
    before = {path: path.stat().st_mtime_ns for path in rows.rglob("*.json")}
    path = tmp_path / folder / "fog/3/ant/1.png"
    Image.fromarray(255 - read_image(path)).save(path)
    again = call("compare", study, *options)
    written = {path.relative_to(rows).as_posix() for path, time in before.items() if path.stat().st_mtime_ns != time}
    fog = {f"{method}/any/fog/3.json" for method in ("source", "memo", "dda")}
    assert {name for name in written if "/any/" in name} == (fog if folder == "target" else {"dda/any/fog/3.json"})
    assert {json.loads((rows / name).read_text())["timed"] for name in written if "/any/" in name} == {5}
    streams = {name for name in written if name.startswith("tent/") and not name.endswith("snow/3.json")}
    assert streams == written - fog
    assert bool(streams) == (folder == "target")
    if folder == "target":
        assert outcomes(again) == outcomes(call("compare", study, *options, "--output", tmp_path / "fresh"))


def test_other_settings_are_refused(tmp_path, study, call):
    call("compare", study, "--method", "source", "--method", "memo")
    message = call("compare", study.replace("memo = { views = 2 }", "memo = { views = 3 }"), "--method", "memo", code=2)
    assert "made with options.views = 2, this run has options.views = 3: use another --output" in message
    assert "made with resize = true" in call("compare", study + "[evaluate]\nresize = false", *QUICK, code=2)
    message = call("compare", study, "--method", "source", "--option", "source.views=2", code=2)
    assert "method source: got an unexpected keyword argument 'views'" in message


def test_two_processes_find_what_one_finds(tmp_path, study, call):
    text = "\n".join(line for line in study.splitlines() if not line.startswith("convnext"))
    text = text.replace("[compare]\n", "[compare]\nbatch_sizes = [4]\nmixed_classes = [true]\n")
    rows = outcomes(call("compare", text, *QUICK))
    assert outcomes(call("compare", text, *QUICK, "--workers", "2", "--output", tmp_path / "two")) == rows


def test_a_model_that_is_fine_tuned_already_is_taken(tmp_path, study, call, tiny):
    models = [f"--finetuned={name}={getattr(tiny, name)}" for name in MODELS]
    rows = call("compare", study, "--method", "dda", "--method", "sda", *models)
    found = outcomes(rows)
    assert not (tmp_path / "out" / "synthetic").exists()
    for (method, *cell), right in found.items():
        assert method == "SDA" or found["SDA", *cell] == right  # "fine-tuned" is the source itself
    message = call("compare", study, "--finetuned", f"swin={tiny.resnet}", code=2)
    assert "finetuned: 'swin' is no classifier of this study" in message


def test_what_the_evaluation_says_counts(tmp_path, study, call, tiny):
    """Engine and options of a run's evaluation."""
    study = study.replace("memo = { views = 2 }\n", "")
    study += '[evaluate]\nengine = "onnx"\n[evaluate.options.memo]\nviews = 3\n'
    call("compare", study, "--method", "source", "--method", "memo")
    settings = [
        json.loads((tmp_path / f"out/compare/resnet/{m}/manifest.json").read_text()) for m in ("source", "memo")
    ]
    assert settings[0]["settings"]["engine"] == "onnx"
    assert settings[1]["settings"]["options"] == {"views": 3}
    assert "engine" not in settings[1]["settings"]  # it differentiates the module
    path = tmp_path / "shared.toml"
    path.write_text(study + '[finetuned]\nresnet = "m.safetensors"\n')
    read_config(path)  # a run passes over what is a study's


def test_approximate_projections_are_said_to_be_so(tmp_path, study, call):
    call("compare", study.replace("[align]", "[align]\njacobian_free = true"), "--method", "dda")
    for file in ("results.md", "report.html"):
        assert JACOBIAN_FREE in (tmp_path / "out" / "compare" / file).read_text()
    manifest = json.loads((tmp_path / "out" / "projected" / "dda" / "manifest.json").read_text())
    assert manifest["settings"]["jacobian_free"] is True


def test_projections_as_jpegs_are_found(tmp_path, study, call):
    for file in (tmp_path / "target").rglob("*.png"):
        Image.open(file).convert("RGB").save(file.with_suffix(".jpg"))
        file.unlink()
    rows = call("compare", study.replace("[align]", '[align]\nformat = "original"'), "--method", "dda")
    assert len(rows) == 4
    assert list((tmp_path / "out" / "projected" / "dda").rglob("*.jpg"))


def test_an_image_that_cannot_be_read_stops_the_study(tmp_path, study, call):
    (tmp_path / "target" / "fog" / "3" / "ant" / "1.png").write_text("no picture")
    assert "fog/3/ant/1.png is not an image" in call("compare", study, "--method", "source", code=2)
    message = call("compare", study, "--method", "dda", code=2)
    assert "a study shows every method the same images: all is done but 1 file of the input (fog/3/ant/1" in message


def test_uncorrupted_images_are_compared_where_there_are_no_others(tmp_path, study, call):
    for group in ("fog", "snow"):
        shutil.rmtree(tmp_path / "target" / group)
    rows = call("compare", study, "--method", "source")
    assert {(row["corruption"], row["severity"], row["images"]) for row in rows} == {("clean", 0, 4)}


GUESS = """
import torch
from sda_fast.methods.base import Method


class Guess(Method):
    title = "Always the first"

    def scores(self, images, projected):
        return torch.tensor([[1.0, 0.0, 0.0]]).expand(len(images), 3)
"""


def test_a_ninth_method_takes_a_file_and_a_line(tmp_path, study, call, monkeypatch):
    assert "method 'guess' is not known" in call("compare", study, "--method", "guess", code=2)
    (tmp_path / "guess.py").write_text(GUESS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS, "guess", "guess:Guess")
    rows = call("compare", study, "--method", "source", "--method", "guess")
    mine = [row for row in rows if row["method"] == "Always the first"]
    assert {row["stream"] for row in mine} == {"any"}
    assert [row["outcomes"] for row in mine] == ["1100"] * 4
    out = tmp_path / "out" / "compare"
    header, _, line = (out / "results.md").read_text().splitlines()[2:5]
    assert header == "| model | Source | Always the first |"
    assert "50.0" in line.split("|")[3]
    assert "Always the first" in (out / "report.html").read_text()
    assert "Always the first" in (out / "comparisons.csv").read_text()
    # Where no method is named it is among all of them.
    assert chosen_methods(CompareSettings())[-1] == "guess"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "compare takes either a TOML file or --preset photos: give one of them."),
        (["study.toml", "--preset", "photos"], "compare takes either a TOML file or --preset photos"),
        (["--preset", "imagenet"], "--preset imagenet is not known; it is photos, or give a TOML file"),
        (["study.toml", "--per-class", "2"], "--per-class, --corruption and --synthetic are for --preset photos"),
        (["study.toml"], "study.toml cannot be read (No such file or directory)"),
    ],
)
def test_wrong_use(cli, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    said = cli("compare", *arguments)
    assert (said.code, said.out) == (2, "")
    assert message in said.err
    assert not list(Path(tmp_path).iterdir())


def test_the_testbed_of_other_patches_is_refused_before_any_is_written(cli, tmp_path, pictures):
    pytest.importorskip("imagecorruptions", reason='needs pip install "sda-fast[photos]"')
    options = ["--output", tmp_path, "--method", "source", "--preset", "photos"]
    assert cli("compare", *options, "--corruption", "fog", "--per-class", 2).code == 0
    written = pictures(tmp_path / "target")
    said = cli("compare", *options, "--corruption", "snow")
    assert said.code == 2
    # The second patch of each class, and the first one under fog.
    assert "holds 42 images that these settings do not ask for, such as clean/astronaut/001.png: give the" in said.err
    assert pictures(tmp_path / "target") == written


def test_torchrun_is_refused(study, tmp_path, monkeypatch):
    (tmp_path / "study.toml").write_text(study)
    monkeypatch.setattr("sda_fast.stages.ranks.ranks", lambda: object())
    with pytest.raises(SdaError, match="compare runs in one process: call it without torchrun"):
        module.compare(read_study(tmp_path / "study.toml"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[finetune]", '[evaluate]\nmode = "mean"\n[finetune]', "[evaluate] mode = 'mean' is not known; choose one of"),
        ("[finetune]", "[evaluate]\nbatch_size = 0\n[finetune]", "[evaluate] batch_size = 0 is out of range"),
        ("[align]", '[align]\nprojection = "diffpure"', "[align] projection = 'diffpure' must be 'dda'"),
        ("memo = { views = 2 }", "memo = 2", "options = {'memo': 2, "),
        ("memo = {", "mono = {", "method 'mono' is not known; choose from source, tent"),
        ("[compare]", "[compare]\nbatch_sizes = [0]", "batch_sizes = [0] is out of range"),
        ("[compare]", '[compare]\nmixed_classes = ["yes"]', "mixed_classes = ['yes'] is of another type; give a list"),
        ("target = ", 'target = "nowhere" #', "target nowhere does not exist"),
        ('recipe = "photos"', 'recipe = "typo"', "recipe 'typo' is not known"),
        ("[align]", '[align]\nengine = "none"', "engine 'none' is not known"),
        ("[compare]", '[finetuned]\nresnet = "nowhere.safetensors"\n[compare]', "nowhere.safetensors"),
    ],
)
def test_what_would_fail_later_fails_at_once(tmp_path, study, call, old, new, message):
    assert message in call("compare", study.replace(old, new, 1), code=2)
    assert not (tmp_path / "out").exists()
