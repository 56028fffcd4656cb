from itertools import pairwise, product
from pathlib import Path

import pytest

from sda_fast.data import ImageFile
from sda_fast.errors import SdaError
from sda_fast.methods import METHODS
from sda_fast.studies.config import CompareSettings, chosen_methods, chosen_streams
from sda_fast.studies.streams import RESETS, Stream, segments

CLASSES = ("ant", "bee", "cow")
GROUPS = {
    group: [ImageFile(Path("root"), f"{group}/{name}/{i}.png") for name in CLASSES for i in range(5)]
    for group in ("fog/3", "snow/3")
}
EVERY = [Stream(*values) for values in product((True, False), (True, False), (1, 4, 64), RESETS)]


def flat(parts):
    return [file for part in parts for batch in part for file in batch]


def corruption(file):
    return file.name.split("/")[0]


@pytest.mark.parametrize("stream", EVERY, ids=str)
def test_every_image_comes_once_and_batches_are_as_large_as_they_can_be(stream):
    parts = segments(stream, GROUPS)
    names = [file.name for file in flat(parts)]
    assert sorted(names) == sorted(file.name for files in GROUPS.values() for file in files)
    sizes = [len(batch) for part in parts for batch in part]
    whole = 30 if stream.mixed_corruptions else 15
    full, rest = divmod(whole, stream.batch_size)
    assert sizes == ([stream.batch_size] * full + [rest] * (rest > 0)) * (1 if stream.mixed_corruptions else 2)


@pytest.mark.parametrize("stream", EVERY, ids=str)
def test_what_is_mixed(stream):
    parts = segments(stream, GROUPS)
    runs = {"class_name": 3 if stream.mixed_corruptions else 6, "corruption": 2}
    seen = flat(parts)
    changes = {
        "class_name": sum(a.class_name != b.class_name for a, b in pairwise(seen)),
        "corruption": sum(corruption(a) != corruption(b) for a, b in pairwise(seen)),
    }
    assert (changes["class_name"] == runs["class_name"] - 1) == (not stream.mixed_classes)
    assert (changes["corruption"] == 1) == (not stream.mixed_corruptions)
    if not stream.mixed_corruptions:
        assert all(len(set(map(corruption, batch))) == 1 for part in parts for batch in part)


@pytest.mark.parametrize("mixed", [True, False])
def test_when_a_method_is_reset(mixed):
    batches = len(segments(Stream(True, mixed, 4, "continual"), GROUPS)[0])
    assert batches == 8
    assert len(segments(Stream(True, mixed, 4, "continual"), GROUPS)) == 1
    assert [len(part) for part in segments(Stream(True, mixed, 4, "batch"), GROUPS)] == [1] * 8
    if not mixed:
        assert [len(part) for part in segments(Stream(True, mixed, 4, "corruption"), GROUPS)] == [4, 4]


def test_the_order_is_drawn_from_the_seed_and_keeps_when_images_are_left_out():
    stream = Stream(True, True, 4, "continual")
    first, again, other = (flat(segments(stream, GROUPS, seed)) for seed in (0, 0, 1))
    assert first == again != other
    fewer = {name: files[::2] for name, files in GROUPS.items()}
    kept = {file for files in fewer.values() for file in files}
    assert flat(segments(stream, fewer)) == [file for file in first if file in kept]


def test_in_order_images_come_by_path():
    names = [file.name for file in flat(segments(Stream(False, False, 4, "corruption"), GROUPS))]
    assert names == sorted(names)


def test_streams_that_make_no_sense_are_left_out():
    streams = chosen_streams(CompareSettings())
    assert len(streams) == len(set(map(str, streams))) == len({stream.folder for stream in streams}) == 20
    assert not any(stream.mixed_corruptions and stream.reset == "corruption" for stream in streams)
    assert str(streams[0]) == "classes mixed, corruptions apart, batches of 64, reset per corruption"
    assert [stream.by_corruption for stream in streams[:4]] == [True, True, False, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (CompareSettings(batch_sizes=(0,)), r"batch_sizes = \[0\] is out of range: give at least 1"),
        (CompareSettings(resets=("never",)), "'never' is not known; choose from corruption, continual, batch"),
        (CompareSettings(mixed_corruptions=(True,), resets=("corruption",)), "leaves no stream"),
        (CompareSettings(batch_sizes=()), "leaves no stream"),
    ],
)
def test_streams_out_of_range(settings, message):
    with pytest.raises(SdaError, match=message):
        chosen_streams(settings)


def test_methods_are_all_or_those_named():
    assert chosen_methods(CompareSettings()) == list(METHODS)
    assert chosen_methods(CompareSettings(methods=("sda", "tent", "sda"))) == ["sda", "tent"]
    with pytest.raises(SdaError, match="method 'magic' is not known"):
        chosen_methods(CompareSettings(methods=("magic",)))
    assert chosen_methods(CompareSettings(methods=("sda",), options={"memo": {"views": 2}})) == ["sda"]
    with pytest.raises(SdaError, match="method 'mono' is not known"):
        chosen_methods(CompareSettings(methods=("sda",), options={"mono": {"views": 2}}))
