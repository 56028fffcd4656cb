"""`sda-fast evaluate` on a made-up ImageNet-C, `<corruption>/<severity>/<wnid>/*.JPEG`, whose predictions are known:
the tables are those computed by hand, also for some of the classes."""

import csv
import json
import shutil
from itertools import product

import numpy as np
import pytest
from PIL import Image
from torch import nn

from sda_fast.data import imagenet_classes
from sda_fast.report import corruption_error
from sda_fast.report.paper import paper_table
from sda_fast.stages import evaluate as stage
from sda_fast.statistics import make_row, wilson_interval

WNIDS = ("n02123045", "n01440764")  # the 282nd and the 1st of ImageNet's classes
CLASSES = imagenet_classes()
SEVERITIES = (1, 2, 3, 4, 5)
# How many of a folder's four images, two of each class, each prediction is right about, by severity. The first of them
# are those of n02123045.
RIGHT = {
    "fog": {"source": (4, 3, 2, 1, 0), "dda": (4, 4, 3, 2, 1), "sda": (4, 4, 3, 3, 2)},
    "gaussian_noise": {"source": (3, 3, 1, 1, 0), "dda": (4, 3, 3, 2, 2), "sda": (4, 4, 4, 3, 2)},
}
TABLE_1 = """\
| model | Source | DDA | SDA |
| :-- | --: | --: | --: |
| resnet50 | 45.0 | 70.0 | **82.5 (+12.5)** |
"""
TABLE_1_OF_ONE_CLASS = """\
| model | Source | DDA | SDA |
| :-- | --: | --: | --: |
| resnet50 | 25.0 | 45.0 | **65.0 (+20.0)** |
"""
# Error rates summed over severities: fog 10/4, 6/4, 4/4 and AlexNet's 4.09662, noise 12/4, 6/4, 3/4 and 4.43214:
# 2.5 / 4.09662 = 0.6103, 3 / 4.43214 = 0.6769, and so on.
MCE = """\
| corruption | Source | DDA | SDA |
| :-- | --: | --: | --: |
| fog | 61.0 | 36.6 | **24.4** |
| gaussian noise | 67.7 | 33.8 | **16.9** |
| mCE | 64.4 | 35.2 | **20.7** |
"""


class Reader(nn.Module):
    """Predicts the class that is painted into its half of the picture, as surely as the blue of that half says."""

    classes, resize, input_size = CLASSES, None, 16

    def __init__(self, row):
        super().__init__()
        self.row = row

    def forward(self, x):
        red, green, blue = ((x[:, :, self.row, 4] + 1) * 127.5).unbind(dim=1)
        index = ((red / 8).round() * 32 + (green / 8).round()).long()
        return nn.functional.one_hot(index, len(CLASSES)) * (5 + blue[:, None] / 10)


def paint(path, upper, lower, sure):
    """Class indices for the two models, in colours that JPEG does not blur over their halves."""
    halves = [np.full((8, 16, 3), (index // 32 * 8, index % 32 * 8, sure), np.uint8) for index in (upper, lower)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(halves)).save(path, format="JPEG", quality=95, subsampling=0)


@pytest.fixture
def imagenet_c(tmp_path, monkeypatch):
    """The folders "target" and "dda", and classifiers "resnet50.pth" and "finetuned.pth" that read the pictures."""
    labels = [CLASSES.index(wnid) for wnid in WNIDS]
    for (corruption, right), severity in product(RIGHT.items(), SEVERITIES):
        for i in range(4):
            truth, wrong = labels[i // 2], labels[1 - i // 2]
            answer = {method: truth if i < counts[severity - 1] else wrong for method, counts in right.items()}
            name = f"{corruption}/{severity}/{WNIDS[i // 2]}/ILSVRC2012_val_{i:08d}.JPEG"
            paint(tmp_path / "target" / name, answer["source"], wrong, sure=40)
            paint(tmp_path / "dda" / name, answer["dda"], answer["sda"], sure=80)
    for name in ("resnet50.pth", "finetuned.pth"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(stage, "load_classifier", lambda path: Reader(2 if "resnet50" in str(path) else 12))
    return tmp_path


@pytest.fixture
def evaluate(imagenet_c, cli):
    def run(*options):
        model, finetuned = imagenet_c / "resnet50.pth", imagenet_c / "finetuned.pth"
        command = ("-i", imagenet_c / "target", "-o", imagenet_c / "out", "--model", model, "--finetuned", finetuned)
        return cli("evaluate", *command, "--projection", f"dda={imagenet_c / 'dda'}", *options)

    return run


def test_the_tables_by_hand(imagenet_c, evaluate):
    said = evaluate("--mce", "alexnet")
    assert (said.code, said.err) == (0, "")
    markdown = (imagenet_c / "out" / "results.md").read_text()
    assert "Accuracy in percent, mean over 2 corruptions, severities 1, 2, 3, 4, 5\n\n" + TABLE_1 in markdown
    assert MCE in markdown
    assert "AlexNet's (over all thousand classes), summed over severities 1, 2, 3, 4, 5" in markdown
    assert "Not the published mCE, which is over fifteen corruptions" in markdown
    with (imagenet_c / "out" / "results.csv").open() as file:
        cells = {(r["method"], r["corruption"], r["severity"]): r for r in csv.DictReader(file)}
    for (corruption, right), method, severity in product(RIGHT.items(), ("Source", "DDA", "SDA"), SEVERITIES):
        cell, correct = cells[method, corruption, str(severity)], right[method.lower()][severity - 1]
        assert (int(cell["images"]), int(cell["correct"]), float(cell["accuracy"])) == (4, correct, correct / 4)
        assert (float(cell["low"]), float(cell["high"])) == wilson_interval(correct, 4)
    assert [float(cells[m, "mean", ""]["accuracy"]) for m in ("Source", "DDA", "SDA")] == pytest.approx(
        [0.45, 0.7, 0.825]
    )
    assert len(cells) == 3 * (10 + 1)
    with (imagenet_c / "out" / "mce.csv").open() as file:
        ce = {(r["method"], r["corruption"]): float(r["ce"]) for r in csv.DictReader(file)}
    assert ce["SDA", "fog"] == pytest.approx(1.0 / 4.09662)
    assert ce["DDA", "mCE"] == pytest.approx((1.5 / 4.09662 + 1.5 / 4.43214) / 2)
    for line in (*TABLE_1.splitlines()[2:], *MCE.splitlines()[2:]):
        assert all(figure.strip(" *") in said.out for figure in line.split("|")[1:-1])


def test_a_subset_of_the_classes(imagenet_c, evaluate):
    """Labels go by name: with the class that stands first in the alphabet alone, every figure is still right."""
    for folder in ("target", "dda"):
        for path in (imagenet_c / folder).glob(f"*/*/{WNIDS[0]}"):
            shutil.rmtree(path)
    said = evaluate("--json")
    assert said.code == 0
    assert TABLE_1_OF_ONE_CLASS in (imagenet_c / "out" / "results.md").read_text()
    assert {row["images"] for row in json.loads(said.out)["rows"]} == {2}
    assert not (imagenet_c / "out" / "mce.csv").exists()


@pytest.mark.parametrize(
    "mode", ["sum", "first", "second", "entropy", "confidence", "var", "entropy_sum", "confidence_sum"]
)
def test_every_ensemble(imagenet_c, evaluate, mode):
    """The projection is the surer one, so all but the original alone follow it."""
    expected = "| resnet50 | **45.0** | **45.0** | **45.0 (+0.0)** |" if mode == "first" else TABLE_1.splitlines()[-1]
    assert evaluate("--ensemble", mode).code == 0
    assert expected in (imagenet_c / "out" / "results.md").read_text()


def test_a_baseline_of_ones_own(imagenet_c, evaluate):
    """Half of the images wrong everywhere: twice the error. mCE is of the tables alone and may be asked for later."""
    assert evaluate().code == 0
    path = imagenet_c / "baseline.json"
    path.write_text(json.dumps({corruption: dict.fromkeys(SEVERITIES, 0.5) for corruption in RIGHT}))
    records = json.loads(evaluate("--mce", path, "--json").out)["mce"]
    assert {r["method"]: r["ce"] for r in records if r["corruption"] == "mCE"} == pytest.approx(
        {"Source": 1.1, "DDA": 0.6, "SDA": 0.35}
    )
    path.write_text(json.dumps({"fog": dict.fromkeys(SEVERITIES, 0.5)}))
    assert f"--mce {path} has no error for gaussian_noise at severity 1: give a file" in evaluate("--mce", path).err
    for content, message in {
        '{"fog": {"1": 2}}': "2.0 for fog at severity 1 is no error rate in (0, 1]: mend it there",
        '{"fog": [0.5]}': 'is not of the form {"fog": {"5": 0.945}} (',
        "fog": 'is not of the form {"fog": {"5": 0.945}} (',
    }.items():
        path.write_text(content)
        said = evaluate("--mce", path)
        assert said.code == 2
        assert message in said.err
    assert "--mce none cannot be read (No such file or directory)" in evaluate("--mce", "none").err


def test_alexnets_errors_are_for_imagenets_classes_and_for_corruptions(imagenet_c, evaluate):
    paint(imagenet_c / "target" / "fog" / "1" / "cat" / "1.JPEG", 0, 0, 0)
    assert "--mce alexnet is of ImageNet's classes, and cat is none: give a file" in evaluate("--mce", "alexnet").err
    shutil.rmtree(imagenet_c / "target")
    paint(imagenet_c / "target" / "val" / WNIDS[0] / "1.JPEG", 0, 0, 0)
    assert "--mce is for folders of the form <corruption>/<severity>/<class>" in evaluate("--mce", "alexnet").err
    assert not (imagenet_c / "out").exists()


def test_alexnets_errors_have_the_published_means():
    """Those of the paper's fifteen corruptions, which are known to six digits apart from the errors by severity."""
    means = {
        **{"gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880},
        **{"glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816},
        **{"frost": 0.826572, "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204},
        **{"elastic_transform": 0.646056, "pixelate": 0.717840, "jpeg_compression": 0.606500},
    }
    baseline = corruption_error.read_baseline("alexnet")
    assert len(baseline) == corruption_error.PUBLISHED
    for corruption, expected in means.items():
        assert sum(baseline[corruption, s] for s in SEVERITIES) / 5 == pytest.approx(expected, abs=1e-6)


def test_table_2_is_of_one_set_and_tables_of_several_models():
    """ImageNet-W has neither corruptions nor severities; a method that a model lacks has no figure."""
    right = {("resnet50", "Source"): 3, ("resnet50", "DDA"): 5, ("resnet50", "SDA"): 6, ("swin", "Source"): 7}
    rows = [make_row(method, model, "val", 0, np.arange(10) < n) for (model, method), n in right.items()]
    table = paper_table(rows)
    assert table.caption == "Accuracy in percent, val"
    assert [[cell.text for cell in line] for line in table.body] == [
        ["resnet50", "30.0", "50.0", "60.0 (+10.0)"],
        ["swin", "70.0", "–", "–"],
    ]
    assert [cell.best for cell in table.body[0]] == [False, False, False, True]
    assert table.records[2]["accuracy"] == 0.6
    assert (table.records[2]["low"], table.records[2]["high"]) == wilson_interval(6, 10)
