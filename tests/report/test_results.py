import pytest

from sda_fast.report import accuracy_table, make_row
from sda_fast.report.results import by_model, comparable_pairs, first_stream
from sda_fast.report.tables import stream_tables


def row(method, stream=None, corruption="fog", model="resnet", images=4):
    made = make_row(method, model, corruption, 3, [True] * (images // 2) + [False] * (images - images // 2))
    return made if stream is None else {**made, "stream": stream}


def test_each_stream_has_the_rows_that_hold_for_all():
    rows = [row("Source"), row("SDA", "any"), row("Tent", "mixed"), row("Tent", "ordered")]
    mixed, ordered = by_model(rows)
    assert (mixed.stream, ordered.stream) == ("mixed", "ordered")
    assert mixed.methods == ordered.methods == ("Source", "SDA", "Tent")
    assert mixed.title == "resnet, mixed"
    assert [table.caption.split(" in percent")[0] for table in accuracy_table(rows)] == [
        "Accuracy of resnet, mixed",
        "Accuracy of resnet, ordered",
    ]


def test_without_streams_nothing_is_said_of_them():
    for rows in ([row("Source")], [row("Source", "any")], [row("Source", "")]):
        (results,) = by_model(rows)
        assert (results.stream, results.title) == ("", "resnet")
        assert stream_tables(rows) == []
        assert first_stream(rows) == rows


def test_the_first_stream():
    rows = [row("Source"), row("Tent", "ordered"), row("Tent", "mixed"), row("Tent", "mixed", model="convnext")]
    assert first_stream(rows) == [rows[0], rows[1], rows[3]]


def test_a_row_that_holds_for_all_and_one_of_a_stream_are_two_of_one():
    with pytest.raises(ValueError, match="two results for Tent"):
        by_model([row("Tent"), row("Tent", "mixed")])


def test_streams_are_compared_by_their_means():
    rows = [row("Source", corruption=c) for c in ("fog", "snow")]
    rows += [{**row("Tent", "ordered", c), "accuracy": a} for c, a in (("fog", 0.75), ("snow", 0.25))]
    rows += [row("Tent", "mixed")]  # lacks a corruption, so that its mean would not compare
    (table,) = stream_tables(rows)
    assert table.header == ("stream", "Source", "Tent")
    texts = [[cell.text.split(" ")[0] for cell in line] for line in table.body]
    assert texts == [["ordered", "50.0", "50.0"], ["mixed", "50.0", "–"]]
    assert [record["stream"] for record in table.records] == ["ordered", "ordered", "mixed"]


def test_pairs_are_each_method_against_the_first_and_those_asked_for():
    rows = [row(method, corruption=c) for method in ("Source", "DDA", "SDA") for c in ("fog", "snow")]
    further = [("SDA", "DDA"), ("SDA", "Source"), ("SDA", "absent")]
    assert comparable_pairs(rows, further) == [("DDA", "Source"), ("SDA", "Source"), ("SDA", "DDA")]


def test_pairs_on_other_images_are_not_compared():
    assert comparable_pairs([row("Source"), row("SDA", corruption="snow")]) == []
    assert comparable_pairs([row("Source"), row("SDA", images=6)]) == []
    assert comparable_pairs([row("Source"), row("SDA", model="convnext")]) == []
    assert comparable_pairs([row("Source")]) == []
