"""A folder of everything that goes wrong: each stage does the rest, names every failure, and tries again when asked."""

import io
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sda_fast.data import read_image
from sda_fast.errors import SdaError
from sda_fast.stages.failures import read_failures

ALIGN = ("--respacing", 10, "--start", 1, "--batch-size", 8)


def picture(size=(40, 30), seed=0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(256, size=(5, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A PNG that says it is of this size and holds nearly nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def damaged() -> dict[str, bytes]:
    """Files that no reader can make a picture of, by name."""
    whole = {kind: encoded(picture((64, 64)), kind) for kind in ("jpeg", "png", "webp", "tiff", "bmp", "gif", "ppm")}
    suffix = {"jpeg": "JPEG", "tiff": "tif"}
    files = {}
    for kind, data in whole.items():
        end = suffix.get(kind, kind)
        files[f"half-{kind}.{end}"] = data[: len(data) // 2]
        files[f"start-{kind}.{end}"] = data[:12]
        files[f"zero-{kind}.{end}"] = b""
    files |= {
        "text.jpg": b"this is a page, not a picture",
        "page.png": b"<!DOCTYPE html><title>404</title>",
        "zeros.jpg": bytes(5000),
        "random.png": np.random.default_rng(1).bytes(5000),
        "archive.jpg": b"PK\x03\x04" + bytes(100),
        "no-end.jpg": whole["jpeg"][:-2],
        "flipped.png": whole["png"][:60] + bytes(40) + whole["png"][100:],
        "header.tif": b"II*\0" * 9,
        "huge.png": png_claiming(20000, 20000),
        "huger.png": png_claiming(2**31 - 1, 2**31 - 1),
        "no-size.png": png_claiming(0, 0),
        "float.tif": encoded(Image.fromarray(np.ones((20, 20), np.float32)), "tiff"),
        "levels.tif": encoded(Image.fromarray(np.ones((20, 20), np.int32)), "tiff"),
        "with space.jpg": b"no picture",
        "new\nline.jpg": b"no picture",
        "schön 捷径.jpg": b"no picture",
        os.fsdecode(b"latin-\xe9.jpg"): b"no picture",
        "'quote\".jpg": b"no picture",
        f"{'long' * 60}.jpg": b"no picture",
    }
    return files


def strange() -> dict[str, bytes]:
    """Files that Pillow's users expect to work, by name."""
    image, exif = picture(), Image.Exif()
    exif[0x0112] = 6
    frames = [picture(seed=i) for i in range(3)]
    wide = np.arange(40 * 30, dtype=np.uint16).reshape(30, 40) * 54
    return {
        "cmyk.jpg": encoded(image.convert("CMYK"), "jpeg"),
        "palette.png": encoded(image.quantize(16), "png"),
        "clear-palette.png": encoded(image.quantize(16), "png", transparency=0),
        "alpha.png": encoded(image.convert("RGBA"), "png"),
        "alpha-webp.webp": encoded(image.convert("RGBA"), "webp"),
        "grey.jpg": encoded(image.convert("L"), "jpeg"),
        "grey-alpha.png": encoded(image.convert("LA"), "png"),
        "one-bit.png": encoded(image.convert("1"), "png"),
        "sixteen-bit.png": encoded(Image.fromarray(wide), "png"),
        "sixteen-bit-tiff.tif": encoded(Image.fromarray(wide), "tiff"),
        "one-pixel.png": encoded(picture((1, 1)), "png"),
        "strip.png": encoded(Image.new("RGB", (20000, 1)), "png"),
        "animated-gif.gif": encoded(frames[0], "gif", save_all=True, append_images=frames[1:]),
        "animated-webp.webp": encoded(frames[0], "webp", save_all=True, append_images=frames[1:]),
        "animated.png": encoded(frames[0], "png", save_all=True, append_images=frames[1:]),
        "turned.jpg": encoded(image, "jpeg", exif=exif),
        "progressive.jpg": encoded(image, "jpeg", progressive=True),
        "jpeg-inside.png": encoded(image, "jpeg"),
        "a space, a\ttab and a\nline.png": encoded(image, "png"),
        "schön ✓.PNG": encoded(image, "png"),
        os.fsdecode(b"latin-\xe8.png"): encoded(image, "png"),
        "two.dots.png": encoded(image, "png"),
    }


@pytest.fixture
def corpus(tmp_path) -> Path:
    """tmp_path/"input": good, strange and bad files in the folders of three classes."""
    root = tmp_path / "input"
    for folder, files in (("ant", damaged()), ("bee", strange()), ("cow", {})):
        (root / folder).mkdir(parents=True)
        for name, data in files.items():
            (root / folder / name).write_bytes(data)
    for i in range(3):
        picture(seed=i).save(root / "ant" / f"good{i}.png")
    for end in ("png", "jpg"):
        picture().save(root / "cow" / f"twin.{end}")
    (root / "cow" / "gone.png").symlink_to("nowhere")
    (root / "cow" / "circle.png").symlink_to("circle.png")
    (root / "cow" / "device.png").symlink_to("/dev/zero")
    (root / "cow" / "secret.png").symlink_to("/proc/self/mem")  # a regular file that not even root can read
    (root / "cow" / "up").symlink_to(root)
    os.mkfifo(root / "cow" / "pipe.png")
    (root / "dog").mkdir()
    (root / "folder.png").mkdir()
    return root


def expected_failures() -> set[str]:
    cow = ("twin.png", "twin.jpg", "gone.png", "circle.png", "device.png", "secret.png", "pipe.png")
    return {f"ant/{name}" for name in damaged()} | {f"cow/{name}" for name in cow} | {"dog/", "folder.png/"}


def good_keys() -> set[str]:
    names = [f"bee/{name}" for name in strange()] + [f"ant/good{i}.png" for i in range(3)]
    return {name.rpartition(".")[0] for name in names}


@pytest.fixture
def quick(monkeypatch):
    """No waiting for the disk: these are a hundred small files."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def test_strange_files_are_read_as_pillows_users_expect(tmp_path):
    first, second = (np.asarray(picture(seed=i)).astype(int) for i in (0, 1))
    for name, data in strange().items():
        (tmp_path / name).write_bytes(data)
        array = read_image(tmp_path / name)
        with Image.open(tmp_path / name) as image:
            if name.startswith("sixteen"):
                expected = np.stack([np.asarray(image) >> 8] * 3, axis=-1)
            else:
                expected = np.array(image.convert("RGB"))
        np.testing.assert_array_equal(array, expected, err_msg=name)
        if name.startswith("animated"):
            assert np.abs(array - first).mean() < np.abs(array - second).mean() / 4
        if name == "turned.jpg":
            assert array.shape == (30, 40, 3)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("decoder", ["pillow", "dali"])
def test_every_bad_file_is_named_and_the_rest_is_done(tmp_path, corpus, tiny, cli, decoder):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali", reason='needs pip install "sda-fast[dali]"')
    bad, good = expected_failures(), good_keys()
    assert len(bad) >= 40
    out = tmp_path / "out"
    command = ("align", "-i", corpus, "-o", out, "--adm", tiny.adm, *ALIGN, "--decoder", decoder)
    said = cli(*command, "--json")
    assert said.code == 3
    summary = {"images": len(bad) + len(good) - 6, "projected": len(good), "failed": len(bad), "output": str(out)}
    assert json.loads(said.out) == summary  # listed are neither the twins, the folders nor what is no regular file
    lines = [line for line in said.err.splitlines() if line.startswith("sda-fast: ")]
    first = ", ".join(sorted(bad)[:3])
    assert lines == [
        f"sda-fast: all is done but {len(bad)} files of the input ({first}, ...): {out}/failures.json says why; "
        "mend or remove them and give the same command again."
    ]
    reasons = read_failures(out)
    assert reasons.keys() == bad
    for name, reason in reasons.items():
        shown = name.replace("\n", "\\n").replace("\udce9", "\\udce9").removesuffix("/")
        assert shown in reason
        assert reason.endswith(".")
        assert len(reason.splitlines()) == 1
    assert {path.relative_to(out).as_posix().removesuffix(".png") for path in out.rglob("*.png")} == good
    assert all(read_image(path).shape == (16, 16, 3) for path in out.rglob("*.png"))

    # What is mended is done by the same command, what is done already is left alone.
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    for name in ("half-jpeg.JPEG", "new\nline.jpg"):
        (corpus / "ant" / name).write_bytes(encoded(picture(), "jpeg"))
    (corpus / "cow" / "twin.jpg").rename(corpus / "cow" / "single.jpg")
    said = cli(*command, "--json")
    assert (said.code, json.loads(said.out)["projected"]) == (3, 4)
    mended = {"ant/half-jpeg.JPEG", "ant/new\nline.jpg", "cow/twin.jpg", "cow/twin.png"}
    assert read_failures(out).keys() == bad - mended
    assert {path: path.stat().st_mtime_ns for path in times} == times

    # Without the bad ones nothing is left to say.
    for name in bad - mended:
        (shutil.rmtree if name.endswith("/") else os.remove)(corpus / name)
    said = cli(*command)
    assert (said.code, said.err) == (0, "")
    assert not (out / "failures.json").exists()


@pytest.mark.usefixtures("quick")
def test_evaluation_goes_on_without_what_it_cannot_read(tmp_path, corpus, tiny, cli):
    shutil.rmtree(corpus / "dog")
    shutil.rmtree(corpus / "folder.png")
    too_small = {"bee/one-pixel.png", "bee/strip.png"}  # the classifier sees 16x16
    bad = {name for name in expected_failures() if not name.endswith("/")} | too_small
    out = tmp_path / "scores"
    said = cli("evaluate", "-i", corpus, "-o", out, "--model", tiny.resnet, "--batch-size", 8, "--json")
    assert said.code == 3
    assert read_failures(out).keys() == bad
    (row,) = json.loads(said.out)["rows"]
    assert row["images"] == len(good_keys()) - len(too_small)
    assert not (out / "rows").exists()  # not final, so the next call scores it again


@pytest.mark.usefixtures("quick")
def test_evaluation_leaves_out_what_one_side_lacks(tmp_path, tiny, cli, write_images):
    names = [f"fog/{severity}/{label}/{i}.png" for severity in (1, 2) for label in ("ant", "bee") for i in range(3)]
    write_images(tmp_path / "target", names)
    write_images(tmp_path / "dda", [name for name in names if name != "fog/1/ant/1.png"])
    (tmp_path / "dda" / "fog/1/bee/2.png").write_bytes(b"torn")
    (tmp_path / "dda" / "fog/1/bee/more.png").write_bytes(b"who is this?")
    command = ("evaluate", "-i", tmp_path / "target", "-o", tmp_path / "out", "--model", tiny.resnet)
    command = (*command, "--projection", f"dda={tmp_path / 'dda'}", "--json")
    said = cli(*command)
    assert said.code == 3
    rows = json.loads(said.out)["rows"]
    assert {(r["method"], r["severity"]): r["images"] for r in rows} == {
        ("Source", 1): 4,
        ("DDA", 1): 4,
        ("Source", 2): 6,
        ("DDA", 2): 6,
    }
    lacking = {"fog/1/ant/1.png", "fog/1/bee/2.png"}
    assert read_failures(tmp_path / "out").keys() == lacking
    assert [path.name for path in (tmp_path / "out" / "rows").rglob("*.json")] == ["2.json"]
    for name in lacking:
        shutil.copy(tmp_path / "target" / name, tmp_path / "dda" / name)
    (tmp_path / "dda" / "fog/1/bee/more.png").unlink()
    said = cli(*command)
    assert said.code == 0
    assert [row["images"] for row in json.loads(said.out)["rows"]] == [6] * 4


@pytest.mark.usefixtures("quick")
def test_a_norm_group_stands_or_falls_together(tmp_path, tiny, cli, write_images, pictures):
    images = write_images(tmp_path / "images", [f"ant/{i}.png" for i in range(7)])
    whole = (images / "ant" / "4.png").read_bytes()
    settings = ("--adm", tiny.adm, *ALIGN[:4], "--norm", "batch", "--norm-group", 3, "--batch-size", 6)
    assert cli("align", "-i", images, "-o", tmp_path / "expected", *settings).code == 0
    (images / "ant" / "4.png").write_bytes(whole[:50])
    said = cli("align", "-i", images, "-o", tmp_path / "out", *settings)
    assert said.code == 3
    reasons = read_failures(tmp_path / "out")
    assert reasons.keys() == {"ant/3.png", "ant/4.png", "ant/5.png"}
    assert reasons["ant/3.png"].startswith("ant/3 is of one norm group with ant/4: ")
    (images / "ant" / "4.png").write_bytes(whole)
    # The manifest knows the input by its path, so the expected folder was made from the same one.
    assert cli("align", "-i", images, "-o", tmp_path / "out", *settings).code == 0
    assert pictures(tmp_path / "out") == pictures(tmp_path / "expected")


def test_workers_report_what_they_cannot_read(tmp_path, tiny, cli, write_images):
    images = write_images(tmp_path / "images", [f"ant/{i}.png" for i in range(4)])
    for i in (0, 3):
        (images / "ant" / f"{i}.png").write_bytes(b"torn")
    command = ("align", "-i", images, "-o", tmp_path / "out", "--adm", tiny.adm, *ALIGN[:4], "--batch-size", 2)
    assert cli(*command, "--workers", 2).code == 3
    assert read_failures(tmp_path / "out").keys() == {"ant/0.png", "ant/3.png"}


@pytest.mark.usefixtures("quick")
def test_a_run_goes_through_and_reports_when_nothing_is_missing(tmp_path, tiny, cli, write_images):
    names = [f"{group}/{label}/{i}.png" for group in ("clean", "fog/3") for label in ("ant", "cow") for i in (1, 2)]
    torn = write_images(tmp_path / "target", names) / names[-1]
    whole = torn.read_bytes()
    torn.write_bytes(whole[:40])
    (tmp_path / "run.toml").write_text(f"""
        output = "{tmp_path / "out"}"
        target = "{tmp_path / "target"}"
        adm = "{tiny.adm}"
        dit = "{tiny.dit}"
        classifiers = {{resnet = "{tiny.resnet}"}}
        align = {{respacing = "10", start = 1}}
        evaluate = {{methods = ["source", "dda"], resize = false}}
        """)
    said = cli("run", tmp_path / "run.toml", "--json")
    assert said.code == 3
    assert [row["images"] for row in json.loads(said.out)["rows"]] == [4, 4, 3, 3]
    assert said.err.count("all is done but 1 file of the input (fog/3/cow/2.png)") == 2  # projecting and evaluating
    assert not (tmp_path / "out" / "report.html").exists()
    torn.write_bytes(whole)
    said = cli("run", tmp_path / "run.toml", "--json")
    assert said.code == 0
    assert [row["images"] for row in json.loads(said.out)["rows"]] == [4, 4, 4, 4]
    assert (tmp_path / "out" / "report.html").exists()


def test_finetuning_names_all_that_it_cannot_read(tmp_path, tiny, cli, write_images):
    images = write_images(tmp_path / "images", [f"ant/{i}.png" for i in range(4)])
    for i in (0, 2, 3):
        (images / "ant" / f"{i}.png").write_bytes(b"torn")
    said = cli("finetune", "-i", images, "-o", tmp_path / "out", "--model", tiny.resnet, "--recipe", "photos")
    assert said.code == 2
    assert "ant/0.png is not an image" in said.err
    assert "(so are 2 others: ant/2.png, ant/3.png)." in said.err


def test_a_damaged_list_of_failures_is_named(tmp_path):
    (tmp_path / "failures.json").write_text("[{}]")
    with pytest.raises(SdaError, match=r"failures\.json cannot be read"):
        read_failures(tmp_path)
