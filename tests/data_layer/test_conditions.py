import pytest

from sda_fast.data import ImageFile, by_condition, describe


@pytest.mark.parametrize(
    ("root", "condition", "expected"),
    [
        ("imagenet-c", "fog/5", ("fog", 5)),
        ("imagenet-c", "weather/fog/1", ("weather/fog", 1)),
        ("imagenet-c", "fog", ("fog", 0)),
        ("imagenet-c", "fog/0", ("fog/0", 0)),
        ("imagenet-c", "fog/6", ("fog/6", 0)),
        ("imagenet-c/fog", "5", ("fog", 5)),  # a single corruption
        ("imagenet-c/fog/5", "", ("fog", 5)),  # a single severity
        ("imagenet-c/fog/5/", "", ("fog", 5)),
        ("val", "", ("val", 0)),
        ("fog/3/..", "", ("fog", 0)),
    ],
)
def test_corruption_and_severity(tmp_path, root, condition, expected):
    assert describe(condition, tmp_path / root) == expected


def test_the_current_folder_has_a_name(tmp_path, monkeypatch):
    (tmp_path / "fog" / "2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "fog" / "2")
    assert describe("", ".") == ("fog", 2)


def test_images_by_the_path_above_their_class():
    names = ["snow/3/ant/2.png", "fog/3/ant/1.png", "ant/1.png", "snow/3/ant/1.png", "snow/3/bee/1.png"]
    found = by_condition([ImageFile("root", name) for name in names])
    assert {condition: [file.name for file in files] for condition, files in found.items()} == {
        "snow/3": [names[0], names[3], names[4]],
        "fog/3": [names[1]],
        "": [names[2]],
    }
    assert list(found) == ["snow/3", "fog/3", ""]
