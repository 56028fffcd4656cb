import json
import shutil

import numpy as np
import pytest
from PIL import Image
from torch import nn

from sda_fast.data import read_image, resize_short_side, to_unit, write_png
from sda_fast.errors import SdaError
from sda_fast.methods.tent import Tent
from sda_fast.models import load_classifier
from sda_fast.stages import evaluate as stage
from sda_fast.stages.align import AlignSettings, align
from sda_fast.stages.evaluate import evaluate
from sda_fast.stages.failures import read_failures, write_failures
from sda_fast.statistics import wilson_interval

CLASSES = ("ant", "bee", "cow")


class Reader(nn.Module):
    """Predicts the class whose index is written in a channel; the last channel holds how sure it is."""

    classes, resize, input_size = CLASSES, None, 16

    def __init__(self, channel):
        super().__init__()
        self.channel = channel

    def forward(self, x):
        level = (x[:, :, 0, 0] + 1) * 127.5
        index = (level[:, self.channel] / 100).round().long()
        return nn.functional.one_hot(index, 3) * level[:, 2:] / 20


def picture(source, finetuned, sure=40):
    """What the source model and the fine-tuned one will say, by class index."""
    return np.full((16, 16, 3), (100 * source, 100 * finetuned, sure), np.uint8)


# key: (true class is the folder) source's answer on the original, and on the DDA projection source's and finetuned's,
# and source's on the DiffPure projection; the projection is the surer one.
IMAGES = {
    "clean/ant/1": (0, 1, 0, 0),
    "clean/cow/1": (2, 2, 2, 2),
    "fog/3/ant/1": (1, 0, 0, 1),
    "fog/3/ant/2": (1, 1, 0, 0),
    "fog/3/cow/1": (0, 1, 1, 2),
    "snow/3/ant/1": (0, 2, 1, 1),
    "snow/3/cow/1": (2, 2, 0, 1),
}
# outcomes in the order of the paths
EXPECTED = {
    ("Source", "clean", 0): "11",
    ("Source", "fog", 3): "000",
    ("Source", "snow", 3): "11",
    ("DiffPure", "clean", 0): "11",
    ("DiffPure", "fog", 3): "011",
    ("DiffPure", "snow", 3): "00",
    ("DDA", "clean", 0): "01",
    ("DDA", "fog", 3): "100",
    ("DDA", "snow", 3): "01",
    ("SDA", "clean", 0): "11",
    ("SDA", "fog", 3): "110",
    ("SDA", "snow", 3): "00",
}


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Folders "target", "dda" and "diffpure", and models "source.bin" and "finetuned.bin" that read pictures."""
    for key, (source, projected, finetuned, diffpure) in IMAGES.items():
        write_png(picture(source, 0, sure=40), tmp_path / "target" / f"{key}.png")
        write_png(picture(projected, finetuned, sure=80), tmp_path / "dda" / f"{key}.png")
        write_png(picture(diffpure, 0), tmp_path / "diffpure" / f"{key}.png")
    for name in ("source.bin", "finetuned.bin"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(stage, "load_classifier", lambda path: Reader(0 if "source" in str(path) else 1))
    return tmp_path


def score(tree, output="out", **options):
    folders = {kind: tree / kind for kind in ("dda", "diffpure")}
    options = {"finetuned": tree / "finetuned.bin", "projections": folders, **options}
    return evaluate(tree / "target", tree / output, tree / "source.bin", **options)


def outcomes(rows):
    return {(row["method"], row["corruption"], row["severity"]): row["outcomes"] for row in rows}


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_accuracies_by_hand(tree, batch_size):
    rows = score(tree, batch_size=batch_size)
    assert outcomes(rows) == EXPECTED
    assert len(rows) == len(EXPECTED)
    for row in rows:
        right = row["outcomes"].count("1")
        low, high = wilson_interval(right, len(row["outcomes"]))
        counts = {"model": "source", "images": len(row["outcomes"]), "correct": right}
        assert row.items() >= {**counts, "low": low, "high": high, "accuracy": right / row["images"]}.items()
    written = json.loads((tree / "out" / "results.json").read_text())
    assert written["rows"] == rows
    assert written["settings"]["methods"] == ["source", "diffpure", "dda", "sda"]
    manifest = json.loads((tree / "out" / "manifest.json").read_text())
    assert manifest["finished"].items() >= {"images": 7, "rows": 12}.items()


def test_methods_and_names_are_chosen(tree):
    rows = score(tree, methods=["sda", "source", "sda"], name="my model")
    assert list(dict.fromkeys(row["method"] for row in rows)) == ["SDA", "Source"]
    assert {row["model"] for row in rows} == {"my model"}
    assert outcomes(rows).items() <= EXPECTED.items()
    methods = {row["method"] for row in score(tree, "less", finetuned=None, projections={"dda": tree / "dda"})}
    assert methods == {"Source", "DDA"}
    assert {row["method"] for row in score(tree, "least", finetuned=None, projections=None)} == {"Source"}


# What the DDA of each mode says of "fog/3/ant/2" where the original says bee and the projection, surer, cow;
# and where the projection is the less sure one.
MODES = {
    "sum": (2, 1),
    "first": (1, 1),
    "second": (2, 2),
    "entropy": (2, 1),
    "confidence": (2, 1),
    "var": (2, 1),
    "entropy_sum": (2, 1),
    "confidence_sum": (2, 1),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sure", [60, 20])
def test_modes(tree, mode, sure):
    write_png(picture(2, 2, sure), tree / "dda" / "fog" / "3" / "ant" / "2.png")
    said = MODES[mode][sure < 40]
    for truth, right in (("bee", said == 1), ("cow", said == 2)):
        for folder in ("target", "dda"):
            shutil.copytree(tree / folder / "fog/3/ant", tree / truth / folder / truth)
        model, folders = tree / "source.bin", {"dda": tree / truth / "dda"}
        rows = evaluate(tree / truth / "target", tree / f"{truth}-out", model, projections=folders, mode=mode)
        assert [row["outcomes"][1] for row in rows if row["method"] == "DDA"] == [str(int(right))]


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("{}", ("set", 0)),
        ("{}/deeper", ("set", 0)),
        ("fog/{}", ("fog", 0)),
        ("fog/5/{}", ("fog", 5)),
        ("weather/fog/5/{}", ("weather/fog", 5)),
        ("fog/7/{}", ("fog/7", 0)),
    ],
)
def test_corruption_and_severity_are_read_from_the_path(tree, layout, expected):
    folder = layout.format("ant") if layout != "{}/deeper" else "deeper/ant"
    expected = ("deeper", 0) if layout == "{}/deeper" else expected
    write_png(picture(0, 0), tree / "set" / folder / "1.png")
    (row,) = evaluate(tree / "set", tree / "out", tree / "source.bin")
    assert (row["corruption"], row["severity"], row["outcomes"]) == (*expected, "1")


def test_rows_say_which_images_they_are_of(tree):
    """Under two corruptions one image of two each cannot be read, and not the same one."""
    for key in ("fog/3/ant/2", "fog/3/cow/1", "snow/3/cow/1"):
        (tree / "target" / f"{key}.png").write_text("no picture")
    rows = {row["corruption"]: row for row in score(tree, methods=["source"])}
    assert rows["clean"]["images"] == 2
    assert rows["fog"]["images"] == rows["snow"]["images"] == 1
    assert rows["fog"]["image_set"] == rows["snow"]["image_set"] != rows["clean"]["image_set"]
    (tree / "target" / "fog/3/ant/1.png").rename(tree / "target" / "fog/3/ant/2.png")
    (tree / "dda" / "fog/3/ant/1.png").rename(tree / "dda" / "fog/3/ant/2.png")
    again = {row["corruption"]: row for row in score(tree, methods=["source"])}
    assert again["fog"]["image_set"] != again["snow"]["image_set"] == rows["snow"]["image_set"]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_no_answer(tree, monkeypatch, wrong):
    """argmax would make the first class of them."""

    class Broken(Reader):
        def forward(self, x):
            scores = super().forward(x)
            scores[-1, 2] = wrong
            return scores

    monkeypatch.setattr(stage, "load_classifier", lambda path: Broken(0))
    with pytest.raises(SdaError, match=r"Source gives scores that are no finite numbers: check the classifier's weigh"):
        score(tree, methods=["source"])
    assert not list((tree / "out").rglob("rows/*.json"))


def test_pairs_go_by_path_whatever_the_suffix(tree):
    path = tree / "dda" / "fog" / "3" / "ant" / "1.png"
    Image.open(path).save(path.with_suffix(".bmp"))
    path.unlink()
    assert outcomes(score(tree)) == EXPECTED


def test_a_missing_counterpart_is_named_and_one_too_many_passed_over(tree):
    path = tree / "dda" / "fog" / "3" / "ant" / "1.png"
    path.rename(path.with_name("7.png"))
    without = {key: line[1:] if key[1] == "fog" else line for key, line in EXPECTED.items()}
    assert outcomes(score(tree)) == without
    where = f"--projection dda={tree / 'dda'}"
    missing = {"fog/3/ant/1.png": f"fog/3/ant/1.png has no projection in {where}: align it first."}
    assert read_failures(tree / "out") == missing
    shutil.copy(path.with_name("7.png"), path)
    assert outcomes(score(tree)) == EXPECTED
    assert not (tree / "out" / "failures.json").exists()


def test_why_there_is_no_projection_is_said(tree):
    (tree / "dda" / "fog/3/ant/1.png").unlink()
    write_failures(tree / "dda", {"fog/3/ant/1.png": "fog/3/ant/1.png is not an image: replace or remove it."})
    score(tree)
    (reason,) = read_failures(tree / "out").values()
    assert reason.endswith(f"{tree / 'dda'}, which left it out: fog/3/ant/1.png is not an image: replace or remove it.")


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"images": 3}', '{"images": ["fog/3/ant/1.png"]}', "\x00"])
def test_damaged_rows_are_made_again(tree, damage):
    expected = score(tree)
    (tree / "out" / "rows" / "fog" / "3.json").write_text(damage)
    assert score(tree) == expected


def test_without_any_image_the_tables_of_before_are_gone(tree, cli, tiny, write_images):
    folder = write_images(tree / "few", ["ant/1.png", "bee/1.png"])
    command = ("evaluate", "-i", folder, "-o", tree / "few-out", "--model", tiny.resnet)
    assert cli(*command).code == 0
    assert {"results.md", "results.csv"} <= {path.name for path in (tree / "few-out").iterdir()}
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    said = cli(*command)
    assert (said.code, said.out) == (3, "No image could be scored.\n")
    assert not {"results.md", "results.csv"} & {path.name for path in (tree / "few-out").iterdir()}
    assert json.loads((tree / "few-out" / "results.json").read_text())["rows"] == []


def test_a_folder_of_other_images_is_refused(tree):
    shutil.move(tree / "dda" / "fog", tree / "elsewhere" / "fog" / "4")
    with pytest.raises(SdaError, match=r"7 images in .*target \(clean.*, \.\.\.\) have no projection: align"):
        score(tree, projections={"dda": tree / "elsewhere"})
    assert not (tree / "out").exists()
    rows = score(tree, methods=["source", "diffpure"])  # a folder nobody asks for is not looked at
    assert outcomes(rows).items() <= EXPECTED.items()


def test_an_interrupted_run_goes_on_to_the_same_rows(tree, monkeypatch):
    make_row, calls = stage.make_row, []

    def interrupted(method, model, corruption, *rest):
        if corruption == "snow":
            raise KeyboardInterrupt
        return make_row(method, model, corruption, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "make_row", interrupted)
        with pytest.raises(KeyboardInterrupt):
            score(tree)
    assert not (tree / "out" / "results.json").exists()
    outcomes_of = stage._outcomes
    monkeypatch.setattr(stage, "_outcomes", lambda *a: calls.append(a[1][0].name) or outcomes_of(*a))
    assert outcomes(score(tree)) == EXPECTED
    assert calls == ["snow/3/ant/1.png"]
    assert (tree / "out" / "results.json").exists()
    assert outcomes(score(tree)) == EXPECTED
    assert len(calls) == 1


def test_other_settings_are_not_mixed_in(tree):
    score(tree)
    with pytest.raises(SdaError, match='made with mode = "sum", this run has mode = "first"'):
        score(tree, mode="first")
    (tree / "finetuned.bin").write_text("other weights")
    with pytest.raises(SdaError, match=r"made with weights\.finetuned = "):
        score(tree)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "mean"}, "--ensemble 'mean' is not known; choose one of sum, first"),
        ({"methods": ["magic"]}, "method 'magic' is not known; choose from source, tent, memo, diffusion_tta"),
        ({"methods": ["gda"]}, "method gda needs a diffusion model of kind adm: give --network adm=FILE"),
        ({"options": {"tent": {"steps": 2}}}, "options are given for method tent, which is not scored"),
        ({"methods": ["source"], "options": {"source": {"x": 1}}}, "method source: got an unexpected keyword argument"),
        ({"networks": {"unet": "file"}}, "--network unet= is not known; choose from adm, dit, vae"),
        (
            {"presets": {"adm": "imagenet256"}},
            "--preset adm=imagenet256 is of no use without the model",
        ),
        ({"methods": ["sda"], "finetuned": None}, "method sda needs a fine-tuned model: give --finetuned FILE"),
        (
            {"methods": ["dda"], "projections": {}},
            "method dda needs the dda projections: give --projection dda=FOLDER",
        ),
        ({"batch_size": 0}, "--batch-size 0 is out of range"),
        ({"projections": {"dda": "nowhere"}}, "--projection dda= nowhere does not exist"),
    ],
)
def test_wrong_options_are_refused(tree, options, message):
    with pytest.raises(SdaError, match=message):
        score(tree, **options)
    assert not (tree / "out").exists()


def test_folders_that_are_no_class_other_classes_and_mixed_sizes_are_refused(tree, monkeypatch):
    other = Reader(1)
    other.classes = ("ant", "cow", "bee")
    with monkeypatch.context() as patch:
        patch.setattr(stage, "load_classifier", lambda path: Reader(0) if "source" in str(path) else other)
        with pytest.raises(SdaError, match=r"finetuned\.bin has other classes than .*source\.bin"):
            score(tree)
    write_png(np.zeros((20, 12, 3), np.uint8), tree / "target" / "fog" / "3" / "cow" / "9.png")
    rows = score(tree, methods=["source"])
    assert outcomes(rows).items() <= EXPECTED.items()
    (reason,) = read_failures(tree / "out").values()
    assert reason.endswith("9.png: a picture of 12x20 is too small, the classifier sees 16x16: use larger images.")
    write_png(picture(0, 0), tree / "target" / "fog" / "3" / "dog" / "1.png")
    with pytest.raises(SdaError, match=r"the folder dog of .* is none of the 3 classes"):
        score(tree, "new", methods=["source"])


def test_a_projection_of_another_kind_is_refused(tree, tiny):
    settings = AlignSettings("diffpure", respacing="10", start=1, batch_size=7)
    align(tree / "target", tree / "aligned", tiny.adm, settings)
    with pytest.raises(SdaError, match=r"dda=.*aligned holds diffpure projections: give it as diffpure="):
        score(tree, projections={"dda": tree / "aligned"})


def test_real_models_see_resized_pictures(tmp_path, tiny, write_images):
    """A classifier that asks for it scales the short side and cuts the centre, whatever the sizes."""
    write_images(tmp_path / "set", ["ant/1.png"], size=(24, 20))
    write_images(tmp_path / "set", ["cow/1.png"], size=(33, 50))
    model = tiny.save("resnet", "resizing", resize=18)
    rows = evaluate(tmp_path / "set", tmp_path / "out", model)
    classifier = load_classifier(model)
    right = ""
    for name, label in (("ant/1.png", 0), ("cow/1.png", 2)):
        image = resize_short_side(read_image(tmp_path / "set" / name), 18)
        right += str(int(classifier(to_unit(image)).argmax() == label))
    assert [row["outcomes"] for row in rows] == [right]


def test_methods_that_adapt_are_run_when_named(tiny, write_images, tmp_path, monkeypatch):
    names = [f"{corruption}/{label}/{i}.png" for corruption in ("fog", "snow") for label in CLASSES for i in range(2)]
    write_images(tmp_path / "target", names)
    options = {
        "memo": {"views": 2},
        "diffusion_tta": {"updates": 1, "pairs": 2},
        "gda": {"views": 2, "start": 1},
    }
    settings = {
        "methods": ["tent", *options],
        "networks": {"adm": tiny.adm, "dit": tiny.dit},
        "options": options,
        "batch_size": 4,
        "quiet": True,
    }
    resets, reset = [], Tent.reset
    monkeypatch.setattr(Tent, "reset", lambda self: (resets.append(self), reset(self)))
    rows = evaluate(tmp_path / "target", tmp_path / "out", tiny.resnet, **settings)
    assert len(resets) == 2, "once before each corruption"
    assert [row["method"] for row in rows] == ["Tent", "MEMO", "Diffusion-TTA", "GDA"] * 2
    assert {row["images"] for row in rows} == {6}
    # By identities, and without what another corruption taught: one alone gives the same rows.
    shutil.rmtree(tmp_path / "target" / "fog")
    alone = evaluate(tmp_path / "target", tmp_path / "alone", tiny.resnet, **settings)
    assert outcomes(alone) == outcomes(rows[4:])
    with pytest.raises(SdaError, match="was made with seed = 0, this run has seed = 1"):
        evaluate(tmp_path / "target", tmp_path / "alone", tiny.resnet, **{**settings, "seed": 1})
