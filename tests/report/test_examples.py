from pathlib import Path
from shutil import rmtree

import numpy as np
import pytest

from sda_fast.data import center_crop, read_image, write_png
from sda_fast.errors import SdaError
from sda_fast.report.examples import before_after, choose_examples, grad_cam_panels, spread


@pytest.fixture
def folders(tmp_path, write_images):
    """A target with two corruptions and clean images, and the projections of all of it."""
    names = [
        f"{g}/{c}/{i}.png" for g in ("clean", "fog/3", "jpeg_compression/3") for c in ("ant", "cow") for i in (1, 2)
    ]
    found = {name: write_images(tmp_path / name, names) for name in ("target", "dda", "diffpure")}
    for name in names:  # the pictures are a function of their names: the projection is to be another one
        write_png(255 - read_image(found["dda"] / name), found["dda"] / name)
    return found


def projections(folders):
    return {kind: folders[kind] for kind in ("dda", "diffpure")}


def test_an_example_of_each_corruption_and_of_another_class(folders):
    examples = choose_examples(folders["target"])
    assert [(e.title, e.file.name) for e in examples] == [
        ("fog 3", "fog/3/ant/1.png"),
        ("jpeg compression 3", "jpeg_compression/3/cow/1.png"),
    ]
    assert [e.original.name for e in examples] == ["clean/ant/1.png", "clean/cow/1.png"]
    assert examples[1].words == "jpeg compression 3, cow"
    assert choose_examples(folders["target"], limit=1) == examples[:1]


@pytest.mark.parametrize("corruption", ["", "fog/3/"])
def test_examples_of_a_plain_folder_and_of_one_corruption(tmp_path, write_images, corruption):
    target = write_images(tmp_path / "plain", [f"{corruption}{c}/{i}.jpg" for c in "abc" for i in range(4)])
    assert [e.title for e in choose_examples(target)] == ["a", "a", "b", "b", "c"]
    assert all(e.words == e.title and e.original is None for e in choose_examples(target))


def test_clean_images_alone_are_shown(tmp_path, write_images):
    (example,) = choose_examples(write_images(tmp_path / "plain", ["clean/a/1.png"]))
    assert (example.file.name, example.original) == ("clean/a/1.png", None)


def test_of_several_severities_one_is_shown_of_every_corruption(tmp_path, write_images):
    kinds = [f"c{i:02d}" for i in range(15)]
    names = [f"{kind}/{severity}/{label}/1.png" for kind in kinds for severity in range(1, 6) for label in "ab"]
    examples = choose_examples(write_images(tmp_path / "many", names, size=(4, 4)))
    assert [example.title for example in examples] == [f"{kind} 3" for kind in kinds]
    assert {example.file.class_name for example in examples} == {"a", "b"}


@pytest.mark.parametrize(
    ("remove", "columns"),
    [((), 4), (("clean/ant/1.png",), 3), (("clean",), 3)],
    ids=["clean", "some clean ones missing", "none clean"],
)
def test_an_original_is_shown_only_where_each_image_has_one(folders, remove, columns):
    for name in remove:
        path = Path(folders["target"], name)
        path.unlink() if path.is_file() else rmtree(path)
    table = before_after(choose_examples(folders["target"]), projections(folders))
    assert table.columns == ("original", "corrupted", "DiffPure", "projected")[-columns:]
    assert [title for title, _ in table.rows] == ["fog 3", "jpeg compression 3"]
    shown = dict(zip(table.columns, table.rows[0][1], strict=True))
    assert np.array_equal(shown["corrupted"].pixels, read_image(folders["target"] / "fog/3/ant/1.png"))
    assert np.array_equal(shown["projected"].pixels, read_image(folders["dda"] / "fog/3/ant/1.png"))
    assert shown["projected"].alt == "fog 3, ant: projected"
    if "original" in shown:
        assert np.array_equal(shown["original"].pixels, read_image(folders["target"] / "clean/ant/1.png"))


def test_images_are_cut_as_their_projections_and_kept_small(tmp_path, write_images):
    target = write_images(tmp_path / "target", ["a/1.jpg", "b/1.png"], size=(240, 200))
    projected = write_images(tmp_path / "dda", ["a/1.png", "b/1.png"], size=(64, 64))
    table = before_after(choose_examples(target), {"dda": projected})
    assert {p.pixels.shape for _, row in table.rows for p in row} == {(64, 64, 3)}
    assert np.array_equal(table.rows[0][1][0].pixels, center_crop(read_image(target / "a/1.jpg"), 64))
    (large,) = {p.pixels.shape for _, row in before_after(choose_examples(target), {}).rows for p in row}
    assert large == (160, 160, 3)


@pytest.mark.parametrize("name", ["resnet", "convnext"])
def test_grad_cam_panels(folders, tiny, name):
    pytest.importorskip("pytorch_grad_cam", reason="Grad-CAM needs the extra report")
    files = getattr(tiny, name)
    examples = choose_examples(folders["target"])
    table = grad_cam_panels(name, files, files, examples, projections(folders), resize=False)
    assert table.columns == (
        "original, source model",
        "corrupted, source model",
        "projected, source model",
        "projected, fine-tuned model",
    )
    assert [title for title, _ in table.rows] == ["fog 3, ant", "jpeg compression 3, cow"]
    for (_, row), truth in zip(table.rows, ("ant", "cow"), strict=True):
        for picture in row:
            assert picture.pixels.shape == (160, 160, 3)
            assert picture.label in tiny.classes
            assert picture.right == (picture.label == truth)
            assert picture.label in picture.alt
        assert np.array_equal(row[2].pixels, row[3].pixels)  # the very model was given as the fine-tuned one
        assert not np.array_equal(row[1].pixels, row[2].pixels)
    assert name in table.note
    alone = grad_cam_panels(name, files, None, examples, {})
    assert len(alone.columns) == 2


def test_a_missing_projection_is_named(folders):
    (folders["dda"] / "fog/3/ant/1.png").unlink()
    with pytest.raises(SdaError, match=r"dda has no projection of fog/3/ant/1\.png: align it first"):
        before_after(choose_examples(folders["target"]), projections(folders))


def test_spread():
    assert spread("abcdef", 3) == ["a", "c", "e"]
    assert spread("ab", 3) == ["a", "b"]
