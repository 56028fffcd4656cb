import csv
import io
import subprocess
import sys

import numpy as np
import pytest

from sda_fast.report import (
    accuracy_table,
    comparison_table,
    make_row,
    mean_interval,
    to_csv,
    to_markdown,
    to_text,
    write_tables,
)
from sda_fast.report.tables import format_p


def row(method, corruption, right, images=100, model="resnet", severity=3):
    return make_row(method, model, corruption, severity, np.arange(images) < right)


@pytest.fixture
def rows():
    return [
        row("Source", "clean", 90, severity=0),
        row("Source", "gaussian_noise", 40),
        row("Source", "fog", 60),
        row("SDA", "clean", 88, severity=0),
        row("SDA", "gaussian_noise", 55),
        row("SDA", "fog", 60),
    ]


def grid(table):
    return [list(table.header), *([cell.text for cell in line] for line in table.body)]


def test_accuracy_wide(rows):
    (table,) = accuracy_table(rows, intervals="none")
    assert grid(table) == [
        ["method", "clean", "gaussian noise", "fog", "mean"],
        ["Source", "90.0", "40.0", "60.0", "50.0"],
        ["SDA", "88.0", "55.0", "60.0", "57.5"],
    ]
    assert table.caption == "Accuracy of resnet in percent, severity 3, 100 images per corruption"
    assert table.summary_rows == 0


def test_accuracy_tall_is_the_transpose(rows):
    (wide,), (tall,) = accuracy_table(rows), accuracy_table(rows, layout="tall")
    transposed = [list(line) for line in zip(*grid(wide), strict=True)]
    assert grid(tall)[1:] == transposed[1:]
    assert grid(tall)[0] == ["corruption", "Source", "SDA"]
    assert tall.summary_rows == 1
    assert grid(accuracy_table(rows, layout="auto")[0]) == grid(tall)  # three corruptions, two methods


def test_intervals(rows):
    low, high = 100 * rows[1]["low"], 100 * rows[1]["high"]
    half, bounds = (accuracy_table(rows, intervals=kind)[0].body[0][2].text for kind in ("half", "bounds"))
    assert half == f"40.0 ±{max(40 - low, high - 40):.1f}"
    assert bounds == f"40.0 [{low:.1f}, {high:.1f}]"


def test_best_is_marked_ties_included(rows):
    (table,) = accuracy_table(rows)
    assert [[cell.best for cell in line] for line in table.body] == [
        [False, True, False, True, False],
        [False, False, True, True, True],
    ]
    (alone,) = accuracy_table(rows[:3])
    assert not any(cell.best for line in alone.body for cell in line)


def test_mean_needs_every_corruption(rows):
    (table,) = accuracy_table(rows[:-1], intervals="none")
    assert [cell.text for cell in table.body[1]] == ["SDA", "88.0", "55.0", "–", "–"]


def test_single_corruption_has_no_mean(rows):
    (table,) = accuracy_table([rows[0], rows[1]])
    assert table.header == ("method", "clean", "gaussian noise")
    assert table.note == "±: the larger distance to the bounds of the 95 % Wilson interval."


def test_severities_are_told_apart():
    rows = [row("SDA", "fog", 50, severity=severity) for severity in (1, 5)]
    (table,) = accuracy_table(rows)
    assert table.header == ("method", "fog 1", "fog 5", "mean")


def test_one_table_per_model(rows):
    tables = accuracy_table([*rows, row("SDA", "fog", 10, model="convnext", images=50)])
    assert [table.caption.split()[2] for table in tables] == ["resnet", "convnext"]
    assert tables[1].header == ("method", "fog")


def test_accuracy_refuses(rows):
    with pytest.raises(ValueError, match="no results"):
        accuracy_table([])
    with pytest.raises(ValueError, match="two results for SDA with resnet under fog, severity 3"):
        accuracy_table([*rows, rows[-1]])


def test_comparison(rows):
    table = comparison_table(rows, [("SDA", "Source")], per_corruption=True)
    assert [[cell.text for cell in line[:3]] for line in table.body] == [
        ["resnet", "SDA - Source", "gaussian noise"],
        ["resnet", "SDA - Source", "fog"],
        ["resnet", "SDA - Source", "all 2"],
    ]
    noise, fog, both = table.records
    assert (noise["b"], noise["c"], noise["p"]) == (15, 0, pytest.approx(2 * 0.5**15))
    assert (fog["difference"], fog["p"]) == (0.0, 1.0)
    assert both["difference"] == pytest.approx(0.075)
    assert both["corruptions"] == 2  # the clean images are not among them
    assert [cell.text for cell in table.body[0][3:4]] == ["+15.0"]
    (pooled,) = comparison_table(rows, [("SDA", "Source")]).records
    assert pooled == both


def test_comparison_skips_models_without_both_methods(rows):
    more = [*rows, row("SDA", "fog", 10, model="convnext")]
    assert {record["model"] for record in comparison_table(more, [("SDA", "Source")]).records} == {"resnet"}


def test_comparison_refuses(rows):
    with pytest.raises(ValueError, match="cannot compare SDA with DDA: there are results of Source, SDA only"):
        comparison_table(rows, [("SDA", "Source"), ("SDA", "DDA")])
    with pytest.raises(ValueError, match="at least one pair"):
        comparison_table(rows, [])
    with pytest.raises(ValueError, match="fog"):
        comparison_table(rows[:-1], [("SDA", "Source")])


@pytest.mark.parametrize(
    ("p", "text"), [(1.0, "1.000"), (0.0494, "0.049"), (0.001, "0.001"), (2.1e-9, "2e-9"), (0.0, "<1e-300")]
)
def test_format_p(p, text):
    assert format_p(p) == text


def test_text(rows):
    text = to_text(accuracy_table(rows, layout="tall", intervals="none"))
    assert (
        text
        == """\
Accuracy of resnet in percent, severity 3, 100 images per corruption (* best)
------------------------------
corruption      Source    SDA
------------------------------
clean             90.0*  88.0
gaussian noise    40.0   55.0*
fog               60.0*  60.0*
------------------------------
mean              50.0   57.5*
------------------------------
Mean: over the corruptions with equal weight. Uncorrupted images are not
part of the mean.
"""
    )


def test_markdown(rows):
    text = to_markdown(accuracy_table(rows, intervals="none"))
    assert (
        text
        == """\
Accuracy of resnet in percent, severity 3, 100 images per corruption

| method | clean | gaussian noise | fog | mean |
| :-- | --: | --: | --: | --: |
| Source | **90.0** | 40.0 | **60.0** | 50.0 |
| SDA | 88.0 | **55.0** | **60.0** | **57.5** |

Mean: over the corruptions with equal weight. Uncorrupted images are not part of the mean.
"""
    )


def test_names_cannot_break_out():
    rows = [row("a|b\n*c*", "fog\x1b[31m", 5), row("<b>", "fog\x1b[31m", 6)]
    table = accuracy_table(rows)
    assert "\x1b" not in to_text(table)
    assert "a|b?*c*" in to_text(table)
    assert r"a\|b?\*c\*" in to_markdown(table)
    assert r"\<b\>" in to_markdown(table)


def test_csv(rows):
    records = list(csv.DictReader(io.StringIO(to_csv(accuracy_table(rows)))))
    assert len(records) == 8
    assert records[1]["corruption"] == "gaussian_noise"  # the name as given, not as printed
    mean = mean_interval([rows[1], rows[2]])
    assert records[3]["corruption"] == "mean"
    assert (float(records[3]["accuracy"]), float(records[3]["low"])) == (mean.mean, mean.low)
    assert (records[3]["correct"], records[3]["images"]) == ("100", "200")
    comparison = comparison_table(rows, [("SDA", "Source")])
    (record,) = csv.DictReader(io.StringIO(to_csv(comparison)))
    assert float(record["difference"]) == pytest.approx(0.075)
    with pytest.raises(ValueError, match="a CSV file each"):
        to_csv([*accuracy_table(rows), comparison])


def test_write_tables(rows, tmp_path):
    tables = accuracy_table(rows)
    for suffix, form in ((".txt", to_text), (".md", to_markdown), (".csv", to_csv)):
        path = write_tables(tmp_path / f"new/table{suffix}", tables)
        assert path.read_text(encoding="utf-8") == form(tables)
    with pytest.raises(ValueError, match=r"\.txt, \.md or \.csv"):
        write_tables(tmp_path / "table.xls", tables)


def test_tables_need_no_heavy_library():
    program = (
        "import sys, sda_fast\n"
        "before = set(sys.modules)\n"
        "import sda_fast.report as r\n"
        "row = r.make_row('SDA', 'm', 'fog', 1, [True, False])\n"
        "r.to_text(r.accuracy_table([row]))\n"
        "extra = {'torch', 'scipy', 'matplotlib', 'jinja2'} & (set(sys.modules) - before)\n"
        "sys.exit(str(extra) if extra else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
