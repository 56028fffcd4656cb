import io
import re

import numpy as np
import pytest
from PIL import Image

from sda_fast.report import accuracy_bars, make_row
from sda_fast.report.bars import bars_svg, bars_text
from sda_fast.report.results import by_model


def opened(path):
    return np.asarray(Image.open(path).convert("RGB"))


def bar_rows(methods, corruptions, models=("resnet",)):
    rng = np.random.default_rng(0)
    return [
        make_row(method, model, corruption, 3, rng.random(50) < 0.5)
        for model in models
        for method in methods
        for corruption in corruptions
    ]


def test_bars(tmp_path):
    small = opened(accuracy_bars(bar_rows(["Source", "SDA"], ["fog", "snow"]), tmp_path / "small.png"))
    two = bar_rows(["Source", "SDA"], [f"corruption_{i}" for i in range(15)], ["resnet", "convnext"])
    large = opened(accuracy_bars(two, tmp_path / "large.png", chance=1 / 14))
    assert large.shape[0] > small.shape[0]
    assert large.shape[1] > small.shape[1]
    for picture in (small, large):
        for colour in ((0x99, 0x99, 0x99), (0x56, 0xB4, 0xE9)):  # both methods have been drawn
            assert (picture == colour).all(axis=-1).sum() > 1000


def test_bars_with_gaps_and_odd_names(tmp_path):
    rows = bar_rows([f"$method_{i}$\n{{" for i in range(9)], ["fog", "snow"])
    rows.append(make_row("other", "con$vnext", "fog", 3, [True] * 20))  # other methods, an interval of no width
    assert opened(accuracy_bars(rows[1:], tmp_path / "bars.png")).size


def size(svg):
    """Width and height in inches."""
    return tuple(
        float(re.search(rb'<svg [^>]*?%s="([\d.]+)pt"' % name, svg).group(1)) / 72 for name in (b"width", b"height")
    )


def test_narrow_bars_take_more_rows():
    (results,) = by_model(bar_rows(["Source", "SDA", "DDA", "DiffPure"], [f"corruption_{i}" for i in range(15)]))
    wide, narrow = (bars_svg(results, results.methods, width) for width in (10.0, 3.5))
    assert size(wide)[0] == pytest.approx(10.0)
    assert size(narrow)[0] == pytest.approx(3.5)
    assert [len(re.findall(rb'id="axes_\d+"', svg)) for svg in (wide, narrow)] == [1, 4]
    assert size(narrow)[1] > 2 * size(wide)[1]
    assert bars_svg(results, results.methods, 10.0) == wide  # the same every time


def test_bars_keep_their_colours_where_a_model_lacks_a_method():
    rows = bar_rows(["Source", "SDA"], ["fog", "snow"]) + bar_rows(["SDA"], ["fog", "snow"], ["convnext"])
    both, one = (bars_svg(results, ["Source", "SDA"], 10.0) for results in by_model(rows))
    assert [both.count(colour) > 2 for colour in (b"#999999", b"#56b4e9")] == [True, True]
    assert [one.count(colour) > 2 for colour in (b"#999999", b"#56b4e9")] == [False, True]


def test_bars_in_words():
    right = {"fog": 1, "gaussian_noise": 3}
    rows = [make_row("SDA", "resnet", c, 3, [True] * k + [False] * (4 - k)) for c, k in right.items()]
    rows += [make_row("Source", "resnet", "fog", 3, [True, False])]
    (results,) = by_model(rows)
    assert bars_text(results) == (
        "Bar chart of the accuracy of resnet under each corruption. "
        "SDA: mean 50.0 %, from 25.0 % (fog) to 75.0 % (gaussian noise). "
        "Source: from 50.0 % (fog) to 50.0 % (fog)."
    )


def test_bars_refuse(tmp_path):
    with pytest.raises(ValueError, match="no results"):
        accuracy_bars([], tmp_path / "bars.png")
    assert not list(tmp_path.iterdir())


def test_bars_leave_matplotlib_settings_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    accuracy_bars(bar_rows(["SDA"], ["fog"]), tmp_path / "bars.png")
    assert dict(matplotlib.rcParams) == before
    assert Image.open(io.BytesIO((tmp_path / "bars.png").read_bytes())).format == "PNG"
