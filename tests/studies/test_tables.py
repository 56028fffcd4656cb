"""The paper's tables from rows that are small enough to follow."""

import pytest

from sda_fast.statistics import make_row, mcnemar, mean_interval
from sda_fast.studies.compare import Result, of_usual_stream
from sda_fast.studies.streams import NO_STREAM, Stream
from sda_fast.studies.tables import comparison_tables, mean_table, pairs, sensitivity_table, stream_tests, time_tables

USUAL = Stream(True, False, 64, "corruption")
SMALL = Stream(False, True, 1, "continual")
# By method, model and stream: the outcomes under fog and under snow.
OUTCOMES = {
    ("Source", "a", None): ("1000", "1100"),
    ("Source", "b", None): ("1111", "1111"),
    ("Tent", "a", USUAL): ("1110", "1110"),
    ("Tent", "a", SMALL): ("0000", "0001"),
    ("Tent", "b", USUAL): ("1000", "1000"),
    ("Tent", "b", SMALL): ("0000", "1000"),
    ("SDA", "a", None): ("1111", "1110"),
    ("SDA", "b", None): ("1110", "1111"),
}


def rows_of(outcomes):
    rows = []
    for (method, model, stream), both in outcomes.items():
        for corruption, right in zip(("fog", "snow"), both, strict=True):
            row = make_row(method, model, corruption, 3, [int(c) for c in right])
            columns = NO_STREAM if stream is None else stream.columns()
            rows.append({**row, **columns, "seconds_per_image": 0.5 if stream is None else 2.0})
    return rows


ROWS = rows_of(OUTCOMES)
SECONDS = {"project (dda)": {"seconds": 30.0, "images": 12}, "finetune a on aligned": {"seconds": 5.0, "images": 9}}
RESULT = Result("compare", ROWS, SECONDS, {}, str(USUAL), {"a": 200.0, "b": 100.0})


def cells(table):
    return [[cell.text for cell in line] for line in table.body]


def bold(table):
    return [[cell.best for cell in line] for line in table.body]


def figure(accuracy, rows):
    mean = mean_interval(rows)
    assert mean.mean == pytest.approx(accuracy)
    return f"{100 * accuracy:.1f} ±{100 * max(mean.mean - mean.low, mean.high - mean.mean):.1f}"


def test_all_methods_side_by_side():
    table = comparison_tables(RESULT)[0]
    assert table.header == ("model", "Source", "Tent", "SDA")
    usual = of_usual_stream(ROWS, str(USUAL))
    expected = {
        ("a", "Source"): 3 / 8,
        ("a", "Tent"): 6 / 8,
        ("a", "SDA"): 7 / 8,
        ("b", "Source"): 1,
        ("b", "Tent"): 2 / 8,
        ("b", "SDA"): 7 / 8,
    }
    for line, model in zip(cells(table), "ab", strict=True):
        own = [[r for r in usual if r["model"] == model and r["method"] == m] for m in ("Source", "Tent", "SDA")]
        assert line == [model, *(figure(expected[model, rows[0]["method"]], rows) for rows in own)]
    assert bold(table) == [[False, False, False, True], [False, True, False, False]]
    assert table.note.endswith(f"Streams of Tent: {USUAL}.")
    record = table.records[2]
    assert record.items() >= {"model": "a", "column": "SDA", "corruptions": 2, "images": 8, "accuracy": 7 / 8}.items()


def test_the_sensitivity_to_the_stream():
    table = sensitivity_table(ROWS)
    assert table.header == ("method", "mixed classes", "mixed corruptions", "reset", "batch size", "a", "b")
    assert [line[:5] for line in cells(table)] == [
        ["Tent", "yes", "no", "corruption", "64"],
        ["Tent", "no", "yes", "continual", "1"],
        ["Source", "any", "any", "any", "any"],
        ["SDA", "any", "any", "any", "any"],
    ]
    assert [[text.split()[0] for text in line[5:]] for line in cells(table)] == [
        ["75.0", "25.0"],
        ["12.5", "12.5"],
        ["37.5", "100.0"],
        ["87.5", "87.5"],
    ]
    assert [line[5:] for line in bold(table)] == [[False, False], [False, False], [False, True], [True, False]]


def test_every_stream_is_tested_against_the_others_on_the_same_images():
    assert stream_tests([row for row in ROWS if row["method"] != "Tent"], ["Source"]) is None
    table = stream_tests(ROWS, ["Source", "SDA"])
    assert len(table.records) == 2 * 2 * 2
    (record,) = [r for r in table.records if (r["model"], r["first"], r["second"]) == ("a", f"Tent ({SMALL})", "SDA")]
    assert (record["b"], record["c"]) == (1, 7)
    assert record["difference"] == pytest.approx(-6 / 8)
    alone = stream_tests([row for row in ROWS if row["corruption"] == "fog"], ["SDA"])
    (record,) = [r for r in alone.records if (r["model"], r["first"]) == ("a", f"Tent ({SMALL})")]
    test = mcnemar("0000", "1111")
    assert (record["test"], record["p"], record["low"]) == ("exact McNemar", test.p, test.low)


def test_who_is_compared_with_whom():
    assert pairs(of_usual_stream(ROWS, str(USUAL))) == [("Tent", "Source"), ("SDA", "Source"), ("SDA", "Tent")]
    assert pairs([row for row in ROWS if row["method"] == "Source"]) == []
    without = [row for row in ROWS if row["method"] != "Source"]
    assert pairs(of_usual_stream(without, str(USUAL))) == [("SDA", "Tent")]


def test_times():
    training, images = time_tables(RESULT)
    assert cells(training) == [["a", "200", "5", "2.5 %"], ["b", "100", "–", "–"]]
    assert cells(images) == [
        ["project (dda)", "–", "2.5"],
        ["Source", "a", "0.5"],
        ["Source", "b", "0.5"],
        ["Tent, batches of 64", "a", "2"],
        ["Tent, batches of 1", "a", "2"],
        ["Tent, batches of 64", "b", "2"],
        ["Tent, batches of 1", "b", "2"],
        ["SDA", "a", "0.5"],
        ["SDA", "b", "0.5"],
    ]


def test_a_cell_without_rows_is_empty():
    own = [row for row in ROWS if row["method"] == "SDA" and row["model"] == "a"]
    table = mean_table("Title", ("component",), ("a", "b"), [(("SDA",), [own, []])], "down")
    assert cells(table) == [["SDA", figure(7 / 8, own), "–"]]
    assert table.records[1]["accuracy"] is None
