"""Results follow their inputs: what was made of a file that has changed since is made anew, and only that."""

import json
import os
import shutil
from dataclasses import replace

import pytest
from PIL import Image

from sda_fast.data import read_image, source_of, write_png
from sda_fast.errors import SdaError
from sda_fast.stages import align as stage
from sda_fast.stages import sources
from sda_fast.stages.align import AlignSettings, align
from sda_fast.stages.corrupt import CorruptSettings, corrupt_folder
from sda_fast.stages.evaluate import evaluate
from sda_fast.stages.manifest import file_sha256
from sda_fast.stages.sources import Sources

SETTINGS = AlignSettings(respacing="10", start=2, batch_size=4)
BATCH = replace(SETTINGS, norm="batch", norm_group=2, batch_size=2)
NAMES = ("fog/3/a/1.png", "fog/3/a/2.jpg", "fog/3/b/3.png", "snow/3/a/1.png", "snow/3/a/2.jpg", "snow/3/b/3.png")


@pytest.fixture
def images(tmp_path, write_images):
    return write_images(tmp_path / "images", NAMES, size=(20, 24))


def turn(path):
    Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path)


def times(folder):
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*.png")}


def changed(before, after):
    return sorted(name for name in after if before.get(name) != after[name])


@pytest.mark.parametrize(
    ("settings", "made"),
    [
        (SETTINGS, ["fog/3/a/2.png"]),
        (replace(SETTINGS, format="original"), ["fog/3/a/2.jpg"]),
        (BATCH, ["fog/3/a/1.png", "fog/3/a/2.png"]),  # the norm is that of both
    ],
    ids=["png", "jpeg", "batch"],
)
def test_a_changed_image_is_projected_anew(tmp_path, images, tiny, settings, made):
    out = tmp_path / "out"
    align(images, out, tiny.adm, settings)
    files = [path for path in out.rglob("*") if path.suffix in (".png", ".jpg")]
    before = {path.relative_to(out).as_posix(): path.stat().st_mtime_ns for path in files}
    turn(images / "fog/3/a/2.jpg")
    assert align(images, out, tiny.adm, settings)["projected"] == len(made)
    assert changed(before, {name: (out / name).stat().st_mtime_ns for name in before}) == made
    align(images, tmp_path / "fresh", tiny.adm, settings)
    assert all((out / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes() for name in before)
    assert align(images, out, tiny.adm, settings)["projected"] == 0


def test_files_with_other_times_and_the_same_content_are_left_alone(tmp_path, images, tiny):
    align(images, tmp_path / "out", tiny.adm, SETTINGS)
    before = times(tmp_path / "out")
    for name in NAMES:
        os.utime(images / name)
    shutil.move(images, tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", images)
    assert align(images, tmp_path / "out", tiny.adm, SETTINGS)["projected"] == 0
    assert times(tmp_path / "out") == before


@pytest.mark.parametrize("settings", [SETTINGS, BATCH], ids=["image", "batch"])
def test_files_are_read_only_where_their_time_is_another(tmp_path, images, tiny, monkeypatch, settings):
    align(images, tmp_path / "out", tiny.adm, settings)
    read = []
    monkeypatch.setattr(sources, "file_sha256", lambda path: read.append(path) or file_sha256(path))
    copied = tmp_path / "scratch"
    shutil.copytree(images, copied)  # with its times
    shutil.rmtree(images)
    shutil.move(copied, images)
    align(images, tmp_path / "out", tiny.adm, settings)
    assert read == []
    os.utime(images / "fog/3/a/1.png")
    align(images, tmp_path / "out", tiny.adm, settings)
    expected = ["fog/3/a/1.png"] if settings is SETTINGS else ["fog/3/a/1.png", "fog/3/a/2.jpg"]
    assert sorted(path.relative_to(images).as_posix() for path in read) == expected


def test_a_changed_image_with_an_old_time_is_noticed(tmp_path, images, tiny):
    """As `cp -p` and archives leave it."""
    align(images, tmp_path / "out", tiny.adm, SETTINGS)
    turn(images / "fog/3/a/1.png")
    os.utime(images / "fog/3/a/1.png", (0, 0))
    assert align(images, tmp_path / "out", tiny.adm, SETTINGS)["projected"] == 1


@pytest.mark.parametrize("settings", [SETTINGS, BATCH], ids=["image", "batch"])
def test_an_older_image_in_the_place_of_one_is_noticed(tmp_path, images, tiny, settings):
    """The last of a group's times stays what it was."""
    for i, name in enumerate(NAMES):
        os.utime(images / name, (10**9 + i, 10**9 + i))
    align(images, tmp_path / "out", tiny.adm, settings)
    turn(images / "fog/3/a/1.png")
    os.utime(images / "fog/3/a/1.png", (10**9 - 5, 10**9 - 5))
    made = 2 if settings is BATCH else 1
    assert align(images, tmp_path / "out", tiny.adm, settings)["projected"] == made


def test_rows_notice_an_older_image_in_the_place_of_one(tmp_path, tiny, write_images):
    target = write_images(tmp_path / "target", [f"fog/3/{name}/1.png" for name in ("ant", "bee", "cow")])
    rows = tmp_path / "out" / "rows" / "fog" / "3.json"
    evaluate(target, tmp_path / "out", tiny.resnet)
    before = rows.stat().st_mtime_ns
    turn(target / "fog/3/ant/1.png")
    os.utime(target / "fog/3/ant/1.png", (0, 0))
    evaluate(target, tmp_path / "out", tiny.resnet)
    assert rows.stat().st_mtime_ns != before


def test_an_image_that_changes_while_it_is_projected_is_noticed(tmp_path, images, tiny, monkeypatch):
    quantised = stage.to_uint8

    def meanwhile(*arguments):
        turn(images / "fog/3/a/1.png")
        return quantised(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "to_uint8", meanwhile)
        align(images, tmp_path / "out", tiny.adm, replace(SETTINGS, batch_size=6))
    assert align(images, tmp_path / "out", tiny.adm, replace(SETTINGS, batch_size=6))["projected"] == 1


def test_a_norm_group_keeps_to_its_corruption(tmp_path, images, tiny, pictures):
    """Three images and two at once: the third of "fog" has its norm alone, whatever comes after."""
    align(images, tmp_path / "out", tiny.adm, BATCH)
    shutil.rmtree(images / "snow")
    align(images, tmp_path / "fog", tiny.adm, BATCH)
    assert pictures(tmp_path / "fog").items() <= pictures(tmp_path / "out").items()


def test_corruptions_of_a_changed_image_are_made_anew(tmp_path, images):
    pytest.importorskip("imagecorruptions", reason='needs pip install "sda-fast[photos]"')
    settings = CorruptSettings(size=32, resize=36)

    def make(out):
        corrupt_folder(images / "fog", tmp_path / out, ["contrast", "fog"], [1], settings)

    make("out")
    before = times(tmp_path / "out")
    turn(images / "fog/3/a/1.png")
    os.utime(images / "fog/3/b/3.png")
    make("out")
    assert changed(before, times(tmp_path / "out")) == ["contrast/1/3/a/1.png", "fog/1/3/a/1.png"]
    make("fresh")
    for name in before:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


@pytest.mark.parametrize("folder", ["target", "dda"])
def test_rows_of_changed_images_are_made_anew(tmp_path, tiny, write_images, folder):
    names = [f"{group}/3/{name}/{i}.png" for group in ("fog", "snow") for name in ("ant", "bee") for i in (1, 2)]
    target, projected = (write_images(tmp_path / name, names) for name in ("target", "dda"))

    def run(out):
        evaluate(target, tmp_path / out, tiny.resnet, projections={"dda": projected})
        root = tmp_path / out / "rows"
        rows = {path.relative_to(root).as_posix(): path for path in root.rglob("*.json")}
        written = {name: path.stat().st_mtime_ns for name, path in rows.items()}
        return written, {name: json.loads(path.read_text())["rows"] for name, path in rows.items()}

    before, first = run("out")
    for name in ("ant/1", "ant/2", "bee/1", "bee/2"):
        turn(tmp_path / folder / f"snow/3/{name}.png")
        os.utime(tmp_path / folder / f"fog/3/{name}.png")
    after, second = run("out")
    assert changed(before, after) == changed(first, second) == ["snow/3.json"]
    assert second == run("fresh")[1]
    assert run("out")[0] == after


def test_a_result_of_which_nothing_is_recorded(tmp_path):
    """One that an earlier version made: it holds as long as its sources are older."""
    source = tmp_path / "source"
    source.write_text("one")
    written = source.stat().st_mtime_ns
    for later, made in ((1, True), (-1, False)):
        assert Sources([source]).made(written + later, lambda: None) is made
        assert Sources([source]).made(written + later, lambda: file_sha256(source))
        assert not Sources([source]).made(written + later, lambda: "another")
    assert Sources([source]).now == (file_sha256(source), written)
    assert Sources([source, tmp_path / "missing"]).mtime_ns == -1
    assert Sources([source, tmp_path / "missing"]).sha256 != Sources([source]).sha256
    assert Sources([source] * 3).sha256 == Sources([source] * 3, threads=2).sha256


def test_projections_of_an_earlier_version_go_on(tmp_path, images, tiny, pictures):
    """Nothing in the file, and a time of its own."""
    align(images, tmp_path / "out", tiny.adm, SETTINGS)
    for path in (tmp_path / "out").rglob("*.png"):
        write_png(read_image(path), path)
    before = pictures(tmp_path / "out")
    for name in NAMES:
        (images / name).chmod(0o600)
    assert align(images, tmp_path / "out", tiny.adm, SETTINGS)["projected"] == 0
    assert pictures(tmp_path / "out") == before


def test_norm_groups_of_an_earlier_version_are_not_mixed_in(tmp_path, images, tiny):
    """They ran across corruptions."""
    align(images, tmp_path / "out", tiny.adm, BATCH)
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["settings"]["norm_groups"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(SdaError, match=r'made with norm_groups = \(absent\), this run has norm_groups = "'):
        align(images, tmp_path / "out", tiny.adm, BATCH)


def test_projections_say_what_they_were_made_of(tmp_path, images, tiny):
    settings = replace(SETTINGS, format="original")
    align(images, tmp_path / "out", tiny.adm, settings)
    for name in NAMES:
        assert source_of(tmp_path / "out" / name) == file_sha256(images / name)
        assert source_of(images / name) is None
