import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from sda_fast.report import comparison_table, make_row, write_report

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that elements nest and collects what the tests ask for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.attributes if name == tag]


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


@pytest.fixture
def report(tmp_path):
    rows = results()
    (tmp_path / "bars.png").write_bytes(png((1200, 30)))
    path = write_report(
        tmp_path / "out/report.html",
        "SDA on photographs",
        rows,
        comparison_table(rows, [("SDA", "Source")]),
        figures=[("The grid", png()), ("The bars", tmp_path / "bars.png", "A bar chart")],
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


def test_report_parses_and_is_semantic(report):
    page = Page(report)
    for tag in ("html", "head", "title", "body", "header", "main", "h1"):
        assert page.tags.count(tag) == 1, tag
    assert page.all("html") == [{"lang": "en"}]
    assert page.tags.count("caption") == page.tags.count("table")
    headings = [text for text in page.texts if text in {"Accuracy", "Comparisons", "Notes", "Figures", "Commands"}]
    assert headings == ["Accuracy", "Comparisons", "Notes", "Figures", "Commands"]
    ids = [attributes["id"] for _, attributes in page.attributes if "id" in attributes]
    assert len(ids) == len(set(ids))
    labelled = [attributes["aria-labelledby"] for _, attributes in page.attributes if "aria-labelledby" in attributes]
    assert set(labelled) <= set(ids)


def test_report_is_self_contained(report):
    page = Page(report)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert "http:" not in report
    assert "https:" not in report
    assert not re.search(r"url\(|@import|\son\w+=", report)
    for _, attributes in page.attributes:
        assert "href" not in attributes
        assert attributes.get("src", "data:").startswith("data:")
    assert any("default-src 'none'" in meta.get("content", "") for meta in page.all("meta"))


def test_figures_are_embedded(report):
    grid, bars = Page(report).all("img")
    assert base64.b64decode(grid["src"].removeprefix("data:image/png;base64,")) == png()
    assert (grid["width"], grid["height"], grid["alt"]) == ("40", "20", "The grid")
    assert (bars["width"], bars["alt"], bars["class"]) == ("1200", "A bar chart", "wide")


def test_values_are_printed(report):
    texts = Page(report).texts
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


def test_phone_and_print_and_dark(report):
    page = Page(report)
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    assert "prefers-color-scheme: dark" in report
    assert "@media print" in report
    scrolling = report.count('<div class="scroll"')
    assert scrolling == report.count('<table class="data') + len(page.all("img"))


def test_everything_is_escaped(tmp_path):
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
        settings={evil: evil, evil + "x": {evil: [evil]}},
        environment={evil: {evil: evil}},
        commands=[evil],
        notes=[evil],
    ).read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert page.tags.count("img") == 1
    assert not any(name.startswith("on") for _, attributes in page.attributes for name in attributes)
    assert page.all("img")[0]["alt"] == evil
    assert "{{ 7 * 7 }}" in text


def test_empty_parts_are_left_out(tmp_path):
    rows = results()
    text = write_report(tmp_path / "report.html", "T", rows).read_text(encoding="utf-8")
    assert [t for t in Page(text).tags if t == "h2"] == ["h2"]
    again = write_report(tmp_path / "again.html", "T", rows).read_text(encoding="utf-8")
    assert again == text  # no date, nothing random


def test_a_report_that_fails_leaves_the_old_one(tmp_path):
    path = write_report(tmp_path / "report.html", "old", results())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="'broken' is not a PNG"):
        write_report(path, "new", results(), figures=[("broken", b"GIF89a")])
    with pytest.raises(FileNotFoundError):
        write_report(path, "new", results(), figures=[("absent", tmp_path / "absent.png")])
    with pytest.raises(ValueError, match="no results"):
        write_report(path, "new", [])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
