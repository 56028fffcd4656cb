import json
from pathlib import Path
from shutil import rmtree

import numpy as np
import pytest
from PIL import Image

from sda_fast.data import read_image
from sda_fast.report import make_row, run
from sda_fast.report.run import environment, write_grid, write_run_report

METHODS = ("Source", "DiffPure", "DDA", "SDA", "SDA, not aligned")


@pytest.fixture
def folders(tmp_path, write_images):
    """A target with two corruptions and clean images, and the projections of all of it."""
    names = [f"{group}/{label}/{i}.png" for group in ("clean", "fog/3", "snow/3") for label in "ab" for i in (1, 2)]
    return {name: str(write_images(tmp_path / name, names)) for name in ("target", "dda", "diffpure")}


def rows(methods=METHODS, corruptions=("clean", "fog", "snow")):
    rng = np.random.default_rng(0)
    return [
        make_row(method, model, corruption, 3 * (corruption != "clean"), rng.random(30) < 0.5)
        for model in ("resnet", "convnext")
        for method in methods
        for corruption in corruptions
    ]


def report(tmp_path, folders, rows):
    result = {"rows": rows, "seconds": {"align": 1.5}, "settings": {"output": "out"}, "folders": folders}
    return write_run_report(tmp_path / "out", result, command="sda-fast run x.toml")


def test_all_files_are_written_and_named(tmp_path, folders):
    text, files = report(tmp_path, folders, rows())
    names = {"report": "report.html", "pictures": "grid.png", "bars": "bars.png"}
    names |= {"table": "results.md", "rows": "results.json"}
    assert files == {kind: str(tmp_path / "out" / name) for kind, name in names.items()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names.values(), "results.csv"}
    for name in METHODS:
        assert name in text
    assert "DDA - Source" in text
    assert "SDA - DDA" in text
    assert "SDA - SDA, not aligned" in text
    assert json.loads((tmp_path / "out" / "results.json").read_text())["seconds"] == {"align": 1.5}
    html = (tmp_path / "out" / "report.html").read_text()
    assert "sda-fast run x.toml" in html
    assert "Seconds per stage: align 1.5." in html
    assert html.count("data:image/png;base64,") == 2
    with Image.open(files["pictures"]) as picture:
        assert picture.width > 4 * 3 * 16


def test_a_single_method_and_no_corruption(tmp_path, folders, write_images):
    plain = {"target": str(write_images(tmp_path / "plain", ["clean/a/1.png"]))}
    text, files = report(tmp_path, plain, rows(("Source",), ("clean",)))
    assert "pictures" not in files
    assert "Source" in text
    assert " - " not in text


@pytest.mark.parametrize(
    ("remove", "columns"),
    [((), 4), (("clean/a/1.png",), 3), (("clean",), 3)],
    ids=["clean", "some clean ones missing", "none clean"],
)
def test_the_grid_has_an_original_only_where_there_is_one(tmp_path, folders, remove, columns, monkeypatch):
    for name in remove:
        path = Path(folders["target"], name)
        path.unlink() if path.is_file() else rmtree(path)
    seen = []
    monkeypatch.setattr(run, "picture_grid", lambda pictures, titles, path: seen.append((pictures, titles)) or path)
    assert write_grid(folders, tmp_path / "grid.png") == tmp_path / "grid.png"
    ((pictures, titles),) = seen
    assert [title for title, _ in pictures] == ["original", "corrupted", "DiffPure", "projected"][-columns:]
    assert titles == ["fog 3", "snow 3"]
    by_title = dict(pictures)
    assert np.array_equal(by_title["corrupted"][0], read_image(Path(folders["target"], "fog/3/a/1.png")))
    assert np.array_equal(by_title["projected"][0], read_image(Path(folders["dda"], "fog/3/a/1.png")))
    if "original" in by_title:
        assert np.array_equal(by_title["original"][0], read_image(Path(folders["target"], "clean/a/1.png")))


def test_a_plain_folder_of_classes_has_a_grid_too(tmp_path, write_images):
    target = write_images(tmp_path / "plain", ["a/1.jpg", "b/1.png"], size=(24, 16))
    projected = write_images(tmp_path / "dda", ["a/1.png", "b/1.png"])
    assert write_grid({"target": str(target), "dda": str(projected)}, tmp_path / "grid.png").is_file()


def test_the_environment_says_what_a_figure_depends_on():
    assert set(environment()) == {"sda-fast", "torch", "python", "device"}
    assert all(environment().values())
