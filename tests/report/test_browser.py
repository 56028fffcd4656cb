"""The report in a headless Chromium, at the widths of a desktop and of phones.

Needs playwright (`pip install playwright`) and a Chromium of the system; screenshots are left in the folder that
SDA_FAST_SCREENSHOTS names.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from sda_fast.data import CORRUPTIONS
from sda_fast.report import Picture, PictureTable, comparison_table, make_row, write_report

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)

METHODS = ("Source", "Tent", "MEMO", "Diffusion-TTA", "DiffPure", "GDA", "DDA", "SDA", "a_ninth_method_of_a_long_name")
STREAMS = ("classes mixed, corruptions apart, batches of 64, reset per corruption", "class by class, batches of 1")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """A report with more of everything than usual."""
    rng = np.random.default_rng(0)
    rows = [
        {**make_row(method, model, corruption, 3, rng.random(20) < 0.5), "stream": stream}
        for model in ("resnet", "convnext_base_with_a_long_name")
        for method in METHODS
        for stream in (STREAMS if method == "Tent" else ("any",))
        for corruption in CORRUPTIONS[:9]
    ]
    sizes = (32, 160)
    pixels = [rng.integers(256, size=(size, size, 3), dtype=np.uint8) for size in sizes]
    row = tuple(Picture(image, "a picture", "motorcycle", right) for image in pixels for right in (True, False))
    table = PictureTable(
        "Pictures", ("original, source model", "projected") * 2, (("gaussian noise 2", row),) * 3, "note"
    )
    return write_report(
        tmp_path_factory.mktemp("report") / "report.html",
        "A report",
        rows,
        comparison_table(rows, [(METHODS[-1], "Source")]),
        pictures=[table],
        settings={"a_setting_of_a_very_long_name" * 3: "a/path/without/any/space" * 9},
        commands=["sda-fast run " + "x" * 300],
        notes=["n" * 300],
    )


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        # Containers often have no user namespaces and little shared memory.
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, page_file):
    """opened(width, scheme="light") -> the page, and what it said and asked for while it was loaded."""
    pages = []

    def visit(width, scheme="light", media="screen"):
        page = browser.new_page(viewport={"width": width, "height": 850}, color_scheme=scheme)
        page.emulate_media(media=media, color_scheme=scheme)
        pages.append(page)
        heard = []
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda request: heard.append(request.url))
        page.goto(page_file.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(element => element.open = true)")
        if folder := os.environ.get("SDA_FAST_SCREENSHOTS"):
            page.screenshot(path=Path(folder, f"report-{width}-{scheme}-{media}.png"), full_page=True)
        return page, heard

    yield visit
    for page in pages:
        page.close()


@pytest.mark.parametrize("width", [1280, 768, 390, 320])
def test_nothing_sticks_out(opened, width):
    page, _ = opened(width)
    full, visible = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert full <= visible == width
    outside = page.evaluate(
        """[...document.querySelectorAll('body *')]
        .filter(element => !element.closest('.scroll') && element.getBoundingClientRect().right > innerWidth + 0.5)
        .map(element => element.outerHTML.slice(0, 80))"""
    )
    assert outside == []
    # What stays in place while a table is scrolled leaves room for the rest.
    widths = "cells => cells.map(cell => cell.offsetWidth)"
    assert max(page.eval_on_selector_all(".data tbody th", widths)) <= width / 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_error_and_no_request(opened, page_file, scheme):
    page, heard = opened(1280, scheme)
    assert heard == [page_file.as_uri()]
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    colours = page.evaluate("(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))")
    ink, paper = (sum(map(int, colour[4:-1].split(","))) for colour in colours)
    assert (ink < paper) == (scheme == "light")
    assert abs(ink - paper) > 400


def test_bars_are_drawn_for_the_width(opened):
    """At either width the chart is shown at its own size, so that its letters are as large as those beside it."""
    shown = {}
    for width in (1280, 390):
        page, _ = opened(width)
        size = "image => [image.currentSrc, image.clientWidth, image.naturalWidth]"
        shown[width] = page.eval_on_selector("picture img", size)
    assert shown[1280][0] != shown[390][0]
    for _, width, natural in shown.values():
        assert 0.95 <= width / natural <= 1.0


def test_in_print_everything_is_on_the_paper(opened):
    page, _ = opened(718, media="print")  # A4 without its margins
    full, visible = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert full <= visible
    assert page.evaluate("[...document.querySelectorAll('.scroll')].every(box => box.scrollWidth <= box.clientWidth)")
