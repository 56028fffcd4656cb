import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from sda_fast.report import Picture, PictureTable, comparison_table, make_row, write_report


def png(size=(40, 20)):
    stream = io.BytesIO()
    Image.new("RGB", size, "red").save(stream, "PNG")
    return stream.getvalue()


def results(methods=("Source", "SDA"), corruptions=("fog", "gaussian_noise")):
    rng = np.random.default_rng(0)
    return [
        make_row(method, model, corruption, 3, rng.random(40) < 0.5)
        for model in ("resnet", "convnext")
        for method in methods
        for corruption in corruptions
    ]


def pictures(word="fog"):
    """Two rows of a patch, a prediction that is right and one that is wrong."""
    patch, photograph = np.zeros((32, 32, 3), np.uint8), np.full((120, 120, 3), 7, np.uint8)
    row = (
        Picture(patch, f"{word}: corrupted"),
        Picture(photograph, f"{word}: ant", "ant", True),
        Picture(photograph, f"{word}: bee", "bee", False),
    )
    return PictureTable(f"Images of {word}", ("corrupted", "one", "other"), ((word, row), ("snow", row)), "a note")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("report")
    rows = results()
    (tmp_path / "bars.png").write_bytes(png((1200, 30)))
    path = write_report(
        tmp_path / "out/report.html",
        "SDA on photographs",
        rows,
        comparison_table(rows, [("SDA", "Source")]),
        figures=[("The grid", png()), ("The bars", tmp_path / "bars.png", "A bar chart")],
        pictures=[pictures()],
        settings={
            "seed": 0,
            "projector": {"scale": 6.0, "deep": {"on": True, "list": [1, "a"]}},
            "empty": {},
        },
        environment={"python": "3.12", "threads": None},
        commands=["make demo"],
        notes=["norm was batch"],
    )
    return path.read_text(encoding="utf-8")


def test_report_parses_and_is_semantic(report, parse):
    page = parse(report)
    for tag in ("html", "head", "title", "body", "header", "main", "h1"):
        assert page.tags.count(tag) == 1, tag
    assert page.all("html") == [{"lang": "en"}]
    wanted = ["Accuracy", "Comparisons", "Images", "Notes", "Figures", "Commands", "Settings", "Environment"]
    assert [text for text in page.texts if text in wanted] == wanted
    page.is_described()


def test_report_is_self_contained(report, parse):
    page = parse(report)
    page.needs_nothing_else()
    assert "http:" not in report
    assert "https:" not in report
    assert not re.search(r"url\(|@import|\son\w+=", report)
    assert any("default-src 'none'" in meta.get("content", "") for meta in page.all("meta"))


def test_each_model_has_bars_for_a_wide_page_and_a_narrow_one(report, parse):
    page = parse(report)
    charts = page.images("svg+xml")
    assert len(charts) == len(page.all("source")) == 2
    for chart, narrow, model in zip(charts, page.all("source"), ("resnet", "convnext"), strict=True):
        assert chart["alt"].startswith(f"Bar chart of the accuracy of {model} under each corruption. Source: mean ")
        assert "max-width" in narrow["media"]
        assert narrow["srcset"] != chart["src"]


def test_image_tables(report, parse):
    page = parse(report)
    shown = [image for image in page.images("png") if image["alt"].startswith("fog: ")]
    assert len(shown) == 2 * 3
    with Image.open(io.BytesIO(base64.b64decode(shown[1]["src"].partition(",")[2]))) as picture:
        assert np.array_equal(np.asarray(picture), np.full((120, 120, 3), 7))
    assert [image.get("class") for image in shown[:3]] == ["patch", None, None]  # only small ones are enlarged
    assert "bee, wrong" in page.texts
    assert "ant" in page.texts
    assert [a["class"] for a in page.all("span") if a.get("class")] == ["right", "wrong"] * 2


def test_a_new_method_appears_by_itself(tmp_path, parse):
    rows = results(("Source", "SDA", "Ninth"))
    text = write_report(tmp_path / "report.html", "T", rows).read_text(encoding="utf-8")
    page = parse(text)
    assert page.texts.count("Ninth") == 2
    assert all("Ninth: mean" in chart["alt"] for chart in page.images("svg+xml"))


def test_streams(tmp_path, parse):
    rows = results(("Source",))
    for stream in ("classes mixed", "class by class"):
        rows += [{**row, "stream": stream} for row in results(("Tent",))]
    page = parse(write_report(tmp_path / "report.html", "T", rows).read_text(encoding="utf-8"))
    assert len(page.images("svg+xml")) == 2  # of the first stream only
    page.is_described()
    assert page.tags.count("details") == 1
    for model in ("resnet", "convnext"):
        assert f"Mean accuracy of {model} in percent, by the order of the images" in page.texts
        for stream in ("classes mixed", "class by class"):
            assert any(f"Accuracy of {model}, {stream} in percent" in text for text in page.texts)


def test_figures_are_embedded(report, parse):
    grid, bars = parse(report).images("png")[-2:]
    assert base64.b64decode(grid["src"].removeprefix("data:image/png;base64,")) == png()
    assert (grid["width"], grid["height"], grid["alt"]) == ("40", "20", "The grid")
    assert (bars["width"], bars["alt"], bars["class"]) == ("1200", "A bar chart", "wide")


def test_values_are_printed(report, parse):
    texts = parse(report).texts
    for text in (
        "seed",
        "projector",
        "scale",
        "6.0",
        "deep.on",
        "true",
        "deep.list",
        "1, a",
        "threads",
        "null",
    ):
        assert text in texts
    for text in ("make demo", "norm was batch", "SDA - Source", "Accuracy of convnext in percent"):
        assert any(text in found for found in texts), text


def test_phone_and_print_and_dark(report, parse):
    page = parse(report)
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    assert "prefers-color-scheme: dark" in report
    assert "@media print" in report
    scrolling = report.count('<div class="scroll"')
    assert scrolling == report.count('<table class="data') + report.count('<table class="pictures') + 2


def test_everything_is_escaped(tmp_path, parse):
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}"
    rows = results(methods=(evil, "SDA"), corruptions=(evil + "a", evil + "b"))
    for row in rows:
        row["model"] += evil
    text = write_report(
        tmp_path / "report.html",
        evil,
        rows,
        comparison_table(rows, [(evil, "SDA")], per_corruption=True),
        figures=[(evil, png(), evil)],
        pictures=[pictures(evil)],
        settings={evil: evil, evil + "x": {evil: [evil]}},
        environment={evil: {evil: evil}},
        commands=[evil],
        notes=[evil],
    ).read_text(encoding="utf-8")
    page = parse(text)
    page.needs_nothing_else()
    assert page.tags.count("img") == 2 + 2 * 3 + 1
    assert page.all("img")[-1]["alt"] == evil
    assert "{{ 7 * 7 }}" in text


def test_empty_parts_are_left_out(tmp_path, parse):
    rows = results()[:2]
    text = write_report(tmp_path / "report.html", "T", rows).read_text(encoding="utf-8")
    assert [t for t in parse(text).tags if t == "h2"] == ["h2"]
    again = write_report(tmp_path / "again.html", "T", rows).read_text(encoding="utf-8")
    assert again == text  # no date, nothing random


def test_a_report_that_fails_leaves_the_old_one(tmp_path):
    rows = results()[:2]
    path = write_report(tmp_path / "report.html", "old", rows)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="'broken' is not a PNG"):
        write_report(path, "new", rows, figures=[("broken", b"GIF89a")])
    with pytest.raises(FileNotFoundError):
        write_report(path, "new", rows, figures=[("absent", tmp_path / "absent.png")])
    with pytest.raises(ValueError, match="no results"):
        write_report(path, "new", [])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
