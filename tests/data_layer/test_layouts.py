"""The folders that users have: classes are found by name in each of them."""

import json

import pytest

from sda_fast.data import imagenet_classes, label_indices, list_images, read_classes
from sda_fast.stages.evaluate import evaluate

WNIDS = ("n01440764", "n02123045", "n15075141")  # tench, tabby, toilet tissue
LAYOUTS = {
    "ImageFolder": ("{}/{}.JPEG", "{root}", 0),
    "ImageFolder, val": ("val/{}/{}.JPEG", "val", 0),
    "ImageNet-C": ("gaussian_noise/5/{}/ILSVRC2012_val_0000{}.JPEG", "gaussian_noise", 5),
    "ImageNet-C in its archives' folders": ("noise/gaussian_noise/5/{}/{}.JPEG", "noise/gaussian_noise", 5),
    "ImageNet-W": ("watermark/{}/{}.JPEG", "watermark", 0),
    "synthetic": ("{}/0000{}.png", "{root}", 0),
}


def test_imagenets_classes_are_the_thousand_in_order():
    classes = imagenet_classes()
    assert len(set(classes)) == 1000
    assert classes == sorted(classes)
    assert [classes.index(name) for name in WNIDS] == [0, 281, 999]


def test_imagenet_is_a_class_list_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_classes("imagenet") == imagenet_classes()
    (tmp_path / "imagenet").write_text("one\ntwo\n")
    assert read_classes("imagenet") == ["one", "two"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_subset_is_labelled_by_name(tmp_path, write_images, layout):
    pattern, _, _ = LAYOUTS[layout]
    root = write_images(tmp_path / "set", [pattern.format(name, i) for name in WNIDS[1:] for i in range(2)])
    assert label_indices(list_images(root), imagenet_classes()) == [281, 281, 999, 999]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_names_corruption_and_severity(tmp_path, tiny, write_images, layout):
    pattern, corruption, severity = LAYOUTS[layout]
    write_images(tmp_path / "set", [pattern.format(name, 1) for name in ("ant", "cow")], size=(24, 24))
    (row,) = evaluate(tmp_path / "set", tmp_path / "out", tiny.resnet)
    assert (row["corruption"], row["severity"]) == (corruption.format(root="set"), severity)


def test_resizing_can_be_left_out(tmp_path, tiny, cli, write_images):
    write_images(tmp_path / "set", [f"{name}/{i}.png" for name in ("ant", "bee") for i in range(4)])
    model = tiny.save("resnet", "enlarging", resize=18)
    command = ("evaluate", "-i", tmp_path / "set", "--model", model, "--json")
    rows = {}
    for option in ("--resize", "--no-resize"):
        out = tmp_path / option
        rows[option] = json.loads(cli(*command, "-o", out, option).out)["rows"]
        settings = json.loads((out / "manifest.json").read_text())["settings"]
        assert (settings["resize"], settings["decoder"]) == (option == "--resize", "pillow")
    plain = tiny.save("resnet", "plain", resize=None)
    (expected,) = evaluate(tmp_path / "set", tmp_path / "plain", plain, name="enlarging")
    assert rows["--no-resize"] == [expected]
    assert cli(*command, "-o", tmp_path / "--resize", "--no-resize").code == 2  # not mixed in one folder
