import json
import re
import sys
from dataclasses import asdict
from shutil import copytree, rmtree

import numpy as np
import pytest
from PIL import Image

from sda_fast.report import make_row, to_text, write_evaluation
from sda_fast.report.approximations import JACOBIAN_FREE, PARTIAL_GDA, PUBLISHED, approximations
from sda_fast.report.run import environment, report_results, write_run_report
from sda_fast.stages.align import AlignSettings

METHODS = ("Source", "DiffPure", "DDA", "SDA", "SDA, not aligned")


@pytest.fixture
def folders(tmp_path, write_images):
    """A target with two corruptions and clean images, and the projections of all of it, in the folder of the run."""
    names = [f"{group}/{label}/1.png" for group in ("clean", "fog/3", "snow/3") for label in ("ant", "cow")]
    return {name: str(write_images(tmp_path / "out" / name, names)) for name in ("target", "dda", "diffpure")}


def rows(methods=METHODS, corruptions=("clean", "fog", "snow"), models=("resnet", "convnext")):
    rng = np.random.default_rng(0)
    return [
        make_row(method, model, corruption, 3 * (corruption != "clean"), rng.random(30) < 0.5)
        for model in models
        for method in methods
        for corruption in corruptions
    ]


def report(tmp_path, folders, rows, models=None, **further):
    settings = {"output": "out", "evaluate": {"resize": False}, **further}
    result = {"rows": rows, "seconds": {"align": 1.5}, "settings": settings, "folders": folders, "models": models or {}}
    return write_run_report(tmp_path / "out", result, command="sda-fast run x.toml")


@pytest.fixture
def finished(tmp_path, folders, tiny):
    """The folder of a run with a fine-tuned ResNet in it."""
    models = {"resnet": {"source": str(tiny.resnet), "finetuned": str(tiny.resnet)}}
    report(tmp_path, folders, rows(models=["resnet"]), models)
    return tmp_path / "out"


def test_all_files_are_written_and_named(tmp_path, folders, parse):
    text, files = report(tmp_path, folders, rows())
    names = {"report": "report.html", "pictures": "grid.png", "bars": "bars.png"}
    names |= {"table": "results.md", "rows": "results.json"}
    assert files == {kind: str(tmp_path / "out" / name) for kind, name in names.items()}
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_file()} == {*names.values(), "results.csv"}
    for name in METHODS:
        assert name in text
    for pair in ("DiffPure - Source", "DDA - Source", "SDA - Source", "SDA - DDA", "SDA - SDA, not aligned"):
        assert pair in text
    assert json.loads((tmp_path / "out" / "results.json").read_text())["seconds"] == {"align": 1.5}
    html = (tmp_path / "out" / "report.html").read_text()
    assert "sda-fast run x.toml" in html
    assert "Seconds per stage: align 1.5." in html
    page = parse(html)
    page.needs_nothing_else()
    page.is_described()
    assert len(page.images("svg+xml")) == 2
    assert len(page.images("png")) == 2 * 4
    with Image.open(files["pictures"]) as picture:
        assert picture.width > 4 * 96


def test_a_single_method_and_no_corruption(tmp_path, folders, write_images):
    plain = {"target": str(write_images(tmp_path / "plain", ["clean/a/1.png"]))}
    text, files = report(tmp_path, plain, rows(("Source",), ("clean",)))
    assert "pictures" in files
    assert "Source" in text
    assert " - " not in text


def test_a_run_moved_elsewhere_is_reported_the_same(tmp_path, finished, parse):
    pytest.importorskip("pytorch_grad_cam", reason="Grad-CAM needs the extra report")
    before = (finished / "report.html").read_bytes()
    copytree(finished, tmp_path / "moved")
    rmtree(finished)
    page, lacking = report_results(tmp_path / "moved")
    assert (page, lacking) == (tmp_path / "moved" / "report.html", [])
    assert page.read_bytes() == before
    parsed = parse(page.read_text())
    parsed.is_described()
    assert "Grad-CAM of resnet" in parsed.texts
    assert sum("Grad-CAM of" in image["alt"] for image in parsed.images("png")) == 2 * 4


def test_grad_cam_is_left_out_on_request_or_with_a_sentence(tmp_path, finished, monkeypatch):
    page, lacking = report_results(finished, tmp_path / "without.html", grad_cam=False)
    assert lacking == []
    assert "Grad-CAM" not in page.read_text()
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    page, lacking = report_results(finished, tmp_path / "lacking.html")
    sentence = 'No Grad-CAM of resnet: Grad-CAM panels need grad-cam: pip install "sda-fast[report]"'
    assert lacking == [sentence]
    assert "No Grad-CAM of resnet" in page.read_text()


def test_images_that_are_gone_are_left_out_with_a_sentence(finished, parse):
    rmtree(finished / "target")
    page, (sentence,) = report_results(finished)
    assert sentence.startswith("No images: ")
    assert len(parse(page.read_text()).images("png")) == 0


def test_rows_of_any_study(tmp_path, parse):
    """Rows alone make a report; those of a further file stand beside them, streams apart."""
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows(("Source", "SDA"), models=["resnet"])}))
    more = [
        {**row, "stream": stream, "batch_size": size}
        for stream, size in (("batches of 64", 64), ("batches of 1", 1))
        for row in rows(("Ninth",), models=["resnet"])
    ]
    (tmp_path / "more.json").write_text(json.dumps({"rows": more}))
    page, lacking = report_results(tmp_path / "rows.json", further=[tmp_path / "more.json"])
    assert (page, lacking) == (tmp_path / "report.html", [])
    parsed = parse(page.read_text())
    assert "Ninth - Source" in parsed.texts
    assert "batches of 1" in parsed.texts
    assert any("Order of the images: batches of 64." in text for text in parsed.texts)
    assert all("Ninth" in image["alt"] for image in parsed.images("svg+xml"))
    assert "of this report" in parsed.texts  # where the results do not tell, the versions of this process


def test_the_folder_of_an_evaluation(tmp_path, folders, parse):
    settings = {"input": folders["target"], "projections": {"dda": folders["dda"]}, "mode": "sum"}
    (tmp_path / "results.json").write_text(json.dumps({"settings": settings, "rows": rows()}))
    page, lacking = report_results(tmp_path)
    assert lacking == []
    assert len(parse(page.read_text()).images("png")) == 2 * 3


def test_an_approximation_is_said(tmp_path, folders):
    for free in (False, True):
        text, _ = report(tmp_path, folders, rows(), align={"scale": 6.0, "jacobian_free": free})
        tables, page = (tmp_path / "out" / name for name in ("results.md", "report.html"))
        places = (text, tables.read_text(), page.read_text())
        assert {JACOBIAN_FREE in " ".join(said.split()) for said in places} == {free}  # lines are broken
    made = {"projections_made_with": {"diffpure": None, "dda": {"jacobian_free": True}}}
    (tmp_path / "results.json").write_text(json.dumps({"settings": made, "rows": rows()}))
    page, _ = report_results(tmp_path)
    assert JACOBIAN_FREE in page.read_text()
    assert JACOBIAN_FREE in to_text(write_evaluation(tmp_path, rows())[0]).replace("\n", " ")
    assert JACOBIAN_FREE in (tmp_path / "results.md").read_text()
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows(models=["exact"])}))
    assert JACOBIAN_FREE not in report_results(tmp_path / "rows.json")[0].read_text()
    assert JACOBIAN_FREE in report_results(tmp_path / "rows.json", further=[tmp_path / "results.json"])[0].read_text()


def test_other_steps_and_missing_terms_are_said():
    usual = AlignSettings().resolved()
    assert PUBLISHED["dda"] == {name: getattr(usual, name) for name in PUBLISHED["dda"]}
    purify = AlignSettings("diffpure").resolved()
    assert PUBLISHED["diffpure"] == {name: getattr(purify, name) for name in PUBLISHED["diffpure"]}
    for settings in (usual, purify, AlignSettings(), AlignSettings("diffpure", scale=3.0)):
        assert approximations({"align": asdict(settings)}, rows(models=["m"])) == []
    few = asdict(AlignSettings(respacing="20", start=10, scale=3.0))
    short = asdict(AlignSettings("diffpure", respacing="10", start=3))
    assert approximations({"projections_made_with": {"dda": few, "diffpure": short}, "align": few}) == [
        "Guided projections (DDA, SDA) have respacing 20, start 10, scale 3.0 (published: 100, 50, 6.0).",
        "DiffPure's projections have respacing 10, start 3 (published: 1000, 150).",
    ]
    assert approximations({}, [{"method": "GDA"}, {"method": "DDA"}, {"method": "GDA"}]) == [PARTIAL_GDA]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"rows\.json cannot be read \(No such file or directory\): give a folder of results, or their file"),
        ("{", r"rows\.json is not JSON"),
        ("[]", r"rows\.json holds no rows of results"),
        ('{"rows": []}', r"rows\.json holds no rows of results"),
        ('{"rows": [{"method": "SDA"}]}', r"rows\.json: a row of results lacks 'model'"),
        ('{"rows": ["SDA"]}', r"rows\.json: a row of results lacks 'method'"),
    ],
)
def test_files_that_hold_no_results(tmp_path, cli, content, message):
    if content is not None:
        (tmp_path / "rows.json").write_text(content)
    said = cli("report", tmp_path / "rows.json")
    assert said.code == 2
    assert len(said.err.splitlines()) == 1
    assert re.search(message, said.err)
    assert not (tmp_path / "report.html").exists()


def test_two_results_of_one_thing(tmp_path, cli):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"rows": rows(("SDA",))}))
    said = cli("report", path, "--rows", path)
    assert said.code == 2
    assert "two results for SDA with resnet under clean" in said.err


def test_the_command(tmp_path, cli, finished):
    said = cli("report", finished, "--output", tmp_path / "page.html", "--no-grad-cam")
    assert (said.code, said.out, said.err) == (0, f"{tmp_path / 'page.html'} is written.\n", "")
    said = cli("report", finished, "--no-grad-cam", "--json")
    assert json.loads(said.out) == {"report": str(finished / "report.html"), "lacking": []}


def test_the_environment_says_what_a_figure_depends_on():
    assert set(environment()) == {"sda-fast", "torch", "timm", "python", "device"}
    assert all(environment().values())
