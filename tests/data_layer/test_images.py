import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sda_fast.data import (
    ImageFile,
    Source,
    find_images,
    identity,
    label_indices,
    list_images,
    pair,
    read_classes,
    read_image,
    source_of,
    write_jpeg,
    write_png,
)
from sda_fast.errors import SdaError

RNG = np.random.default_rng(0)
ARRAY = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


def fill(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def test_listing_is_recursive_sorted_and_knows_the_suffixes(tmp_path):
    fill(
        tmp_path,
        "b/2.PNG",
        "b/1.jpeg",
        "a.webp",
        "b/c/3.TIFF",
        "z.bmp",
        "y.tif",
        "x.jpg",
        "notes.txt",
        "none",
    )
    files = list_images(tmp_path)
    assert [f.name for f in files] == [
        "a.webp",
        "b/1.jpeg",
        "b/2.PNG",
        "b/c/3.TIFF",
        "x.jpg",
        "y.tif",
        "z.bmp",
    ]
    assert files[2] == ImageFile(tmp_path, "b/2.PNG")
    assert pickle.loads(pickle.dumps(files)) == files  # workers are sent these
    assert (files[2].key, files[2].class_name, files[2].path) == ("b/2", "b", tmp_path / "b" / "2.PNG")
    assert files[0].class_name == tmp_path.name


def test_class_name_of_the_current_folder(tmp_path, monkeypatch):
    fill(tmp_path / "brick", "1.png")
    monkeypatch.chdir(tmp_path / "brick")
    assert list_images(".")[0].class_name == "brick"


def test_hidden_and_temporary_files_are_left_out(tmp_path):
    fill(tmp_path, "a.png", ".b.png", ".git/c.png", ".sda-00000000-1-0.tmp")
    assert [f.name for f in list_images(tmp_path)] == ["a.png"]


def test_odd_names_are_listed(tmp_path):
    names = ["a b.png", "new\nline.png", "schön.png", "two.dots.jpg", os.fsdecode(b"\xff.png")]
    fill(tmp_path, *names)
    assert [f.name for f in list_images(tmp_path)] == sorted(names)
    assert len({identity("align", f.name) for f in list_images(tmp_path)}) == 5


def test_links_are_followed_but_not_in_circles(tmp_path):
    fill(tmp_path, "in/a/1.png", "elsewhere/2.png")
    (tmp_path / "in" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "a" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "gone.png").symlink_to("nowhere")
    files = list_images(tmp_path / "in")
    assert [f.name for f in files] == ["a/1.png", "b/2.png", "gone.png"]
    with pytest.raises(SdaError, match=r"gone\.png cannot be read"):
        read_image(files[2].path)


@pytest.mark.parametrize("target", ["nowhere", "motion_blur"])  # the latter is itself
def test_links_that_were_folders_are_named(tmp_path, target):
    """A whole corruption would be missing from a table without a word."""
    fill(tmp_path, "in/fog/1.png")
    (tmp_path / "in" / "motion_blur").symlink_to(target)
    files, failures = find_images(tmp_path / "in")
    assert [f.name for f in files] == ["fog/1.png"]
    assert failures == {"motion_blur/": "is a link that leads nowhere: mend or remove it"}
    with pytest.raises(SdaError, match="in holds motion_blur/, which is a link that leads nowhere: mend or remove it"):
        list_images(tmp_path / "in")


def test_missing_or_empty_folders_are_named(tmp_path):
    with pytest.raises(SdaError, match=r"^--input .*nowhere does not exist"):
        list_images(tmp_path / "nowhere")
    with pytest.raises(SdaError, match=r"--originals .* no files at all"):
        list_images(tmp_path, "--originals")
    fill(tmp_path, "b/notes.txt", "c.csv")
    with pytest.raises(SdaError, match=r"holds no image .*2 other files such as b/notes\.txt"):
        list_images(tmp_path)
    with pytest.raises(SdaError, match="is a file"):
        list_images(tmp_path / "c.csv")


def test_two_images_with_one_key_are_both_named(tmp_path):
    fill(tmp_path, "n/a.jpg", "n/a.png", "n/b.png")
    with pytest.raises(SdaError, match=r"holds n/a\.jpg, which differs from n/a\.png in its suffix alone: rename one"):
        list_images(tmp_path)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "LA", "1"])
def test_every_mode_is_read_as_pillow_converts_it(tmp_path, mode):
    image = Image.fromarray(ARRAY).convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    read = read_image(path)
    assert read.dtype == np.uint8
    assert read.shape == (20, 30, 3)
    assert read.flags.writeable
    with Image.open(path) as reopened:
        np.testing.assert_array_equal(read, np.asarray(reopened.convert("RGB")))


def test_grey_of_16_bits_is_not_clipped(tmp_path):
    Image.fromarray(np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[..., 1].ravel(), np.arange(256))


def test_levels_without_a_range_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(SdaError, match=r"a\.tif .*range"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "bmp"])
def test_a_file_cut_short_is_named(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    for length in (len(whole) // 2, 30, 3):
        path.write_bytes(whole[:length])
        with pytest.raises(SdaError, match=rf"cut\.{suffix} "):
            read_image(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"only text", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0garbage", b"II*\0" * 9],
    ids=["empty", "text", "png", "jpeg", "tiff"],
)
def test_what_is_no_image_is_named(tmp_path, content):
    path = tmp_path / "wrong.png"
    path.write_bytes(content)
    with pytest.raises(SdaError, match=r"wrong\.png "):
        read_image(path)


def test_too_many_pixels_are_refused(tmp_path):
    Image.new("1", (20000, 20000)).save(tmp_path / "huge.png")
    with pytest.raises(SdaError, match=r"huge\.png .*exceeds limit"):
        read_image(tmp_path / "huge.png")


def test_identity_separates_images_and_purposes_and_nothing_else():
    assert identity("align", "n/a.JPEG") == identity("align", "n/a.png") == identity("align", "n/a")
    assert identity("align", "a.png.jpg") == identity("align", "a.png")
    seen = {identity(p, f"class/{i}.png") for p in ("align", "synthesize") for i in range(500)}
    assert len(seen) == 1000
    assert all(0 <= i < 2**63 for i in seen)
    assert max(seen) > 2**62
    # Written down once: a change of this number changes everybody's noise.
    assert identity("align", "n01440764/ILSVRC2012_val_00000293.JPEG") == 5064639123905940056
    assert identity("v1", "two.dots") != identity("v1", "two")


def test_labels_go_by_folder_name(tmp_path):
    files = list_images(fill(tmp_path, "brick/1.png", "brick/2.png", "grass/1.png"))
    assert label_indices(files, ["gravel", "grass", "coins", "brick"]) == [3, 3, 1]
    with pytest.raises(SdaError, match=r"folder grass of .*grass/1\.png is none of the 2 classes \(grasses\)"):
        label_indices(files, ["brick", "grasses"])
    with pytest.raises(SdaError, match="holds brick twice"):
        label_indices(files, ["brick", "grass", "brick"])


def test_class_lists(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeffbrick\r\ngreat white shark \n\nschön\n".encode())
    assert read_classes(path) == ["brick", "great white shark", "schön"]
    for content, message in ((b"a\nb\na\n", "holds a twice"), (b"\n", "is empty"), (b"\xff\xfe\0", "UTF-8")):
        path.write_bytes(content)
        with pytest.raises(SdaError, match=rf"classes\.txt .*{message}"):
            read_classes(path)
    with pytest.raises(SdaError, match="cannot be read"):
        read_classes(tmp_path / "none.txt")


def test_pairs_go_by_key(tmp_path):
    names = ["a/1.JPEG", "a/2.png", "b/1.png"]
    originals = list_images(fill(tmp_path / "o", *names))
    projections = list_images(fill(tmp_path / "p", "a/1.png", "a/2.png", "b/1.jpg"))
    assert [(o.name, p.name) for o, p in pair(originals, projections[::-1])] == [
        ("a/1.JPEG", "a/1.png"),
        ("a/2.png", "a/2.png"),
        ("b/1.png", "b/1.jpg"),
    ]
    with pytest.raises(SdaError, match=r"2 images in .*o \(a/1\.JPEG, a/2\.png\) have no projection"):
        pair(originals, projections[2:])
    with pytest.raises(SdaError, match=r"1 images in .*p \(b/1\.jpg\) have no original"):
        pair(originals[:2], projections)


def test_writing_is_repeatable_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "deep" / "er" / f"{'n' * 250}.png"
    write_png(ARRAY, path)
    first = path.read_bytes()
    write_png(ARRAY[:, ::-1][:, ::-1], path)  # not contiguous, written over the first
    assert path.read_bytes() == first
    assert os.listdir(path.parent) == [path.name]
    np.testing.assert_array_equal(read_image(path), ARRAY)


@pytest.mark.parametrize(("write", "suffix"), [(write_png, ".png"), (write_jpeg, ".jpg")])
def test_an_image_says_what_it_was_made_of(tmp_path, write, suffix):
    plain, path = tmp_path / f"plain{suffix}", tmp_path / f"made{suffix}"
    write(ARRAY, plain)
    write(ARRAY, path, Source("0123456789abcdef" * 4, 1_234_567_890_123_456_789))
    assert path.stat().st_mtime_ns == 1_234_567_890_123_456_789
    assert (source_of(plain), source_of(path)) == (None, "0123456789abcdef" * 4)
    np.testing.assert_array_equal(read_image(path), read_image(plain))
    with pytest.raises(OSError):
        source_of(tmp_path / "missing.png")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SdaError, match=r"file/a\.png cannot be written"):
        write_png(ARRAY, tmp_path / "file" / "a.png")
    with pytest.raises(SdaError, match=r"uint8 of shape"):
        write_png(ARRAY.astype(np.float32), tmp_path / "a.png")
