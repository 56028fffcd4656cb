import json
import os
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from sda_fast.data import (
    DiffusionCrop,
    EvaluationCrop,
    Prefetcher,
    center_crop,
    find_images,
    list_images,
    make_reader,
    read_image,
    resize_short_side,
)
from sda_fast.data.crops import torch_bicubic
from sda_fast.errors import SdaError
from sda_fast.stages.align import AlignSettings, align

# The difference of DALI's crops from Pillow's, in levels: the largest of all, and the mean of each image.
DALI_MAX, DALI_MEAN = 2, 0.02
# GPUs decode with another inverse cosine transform.
GPU_MEAN = 1.0
CROPS = [DiffusionCrop(64), EvaluationCrop(56, 64), EvaluationCrop(56, None)]
SIZES = [(125, 94), (94, 125), (64, 64), (56, 56), (60, 75), (128, 128), (257, 301), (140, 71)]
JPEGS = {
    "default": {},
    "full-colour": {"subsampling": 0},
    "half-colour": {"subsampling": 1},
    "progressive": {"progressive": True},
    "coarse": {"quality": 20},
}


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng([seed, width, height])
    coarse = Image.fromarray(rng.integers(256, size=(height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8))
    smooth = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray(np.clip(smooth + rng.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """JPEGs of many sizes and kinds, and other formats."""
    root = tmp_path_factory.mktemp("photos")
    for i, size in enumerate(SIZES):
        for kind, options in JPEGS.items():
            photo(*size, seed=i).save(root / f"{i}-{kind}.jpg", **options)
    photo(90, 70).convert("L").save(root / "grey.jpg")
    photo(90, 70).convert("CMYK").save(root / "cmyk.jpg")
    photo(90, 70).save(root / "lossless.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(90, 70).save(root / "turned.jpg", exif=exif)
    return root


def differences(one, other):
    return np.array([np.abs(a.astype(int) - b) for a, b in zip(one, other, strict=True)])


@pytest.mark.parametrize("crop", CROPS, ids=str)
def test_pillow_reader_is_the_published_crop_in_order(folder, crop):
    files = list_images(folder)
    for threads in (1, 3):
        images = make_reader("pillow", crop, threads)(files)
        for file, image in zip(files, images, strict=True):
            array = np.array(Image.open(file.path).convert("RGB"))
            if isinstance(crop, DiffusionCrop):
                expected = center_crop(array, 64)
            else:
                array = array if crop.resize is None else resize_short_side(array, crop.resize)
                top, left = (round((side - crop.size) / 2) for side in array.shape[:2])
                expected = array[top : top + crop.size, left : left + crop.size]
            np.testing.assert_array_equal(image, expected)


def test_evaluation_is_torchvisions(folder):
    """Resize of the short side by Pillow's bicubic filter and CenterCrop, as the published configuration does."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    transform = Compose([Resize(64, InterpolationMode.BICUBIC), CenterCrop(56)])
    files = list_images(folder)
    for file, image in zip(files, make_reader("pillow", EvaluationCrop(56, 64))(files), strict=True):
        np.testing.assert_array_equal(image, np.array(transform(Image.open(file.path).convert("RGB"))))


def test_what_has_the_size_already_is_not_touched(tmp_path):
    photo(56, 56).save(tmp_path / "a.png")
    (image,) = make_reader("pillow", EvaluationCrop(56, 56))(list_images(tmp_path))
    np.testing.assert_array_equal(image, read_image(tmp_path / "a.png"))


def test_torchs_filter_is_pillows():
    for width, height in [*SIZES, (500, 375), (9, 300)]:
        array = np.array(photo(width, height))
        for size in (64, 200):
            difference = np.abs(center_crop(array, size, torch_bicubic).astype(int) - center_crop(array, size))
            assert difference.max() <= DALI_MAX
            assert difference.mean() <= DALI_MEAN


@pytest.fixture
def dali():
    return pytest.importorskip("nvidia.dali", reason='needs pip install "sda-fast[dali]"')


@pytest.mark.usefixtures("dali")
@pytest.mark.parametrize("crop", CROPS, ids=str)
def test_dali_stays_within_the_bound(folder, crop):
    files = list_images(folder)
    off = differences(make_reader("dali", crop)(files), make_reader("pillow", crop)(files))
    assert off.max() <= DALI_MAX
    assert off.mean(axis=(1, 2, 3)).max() <= DALI_MEAN
    if isinstance(crop, EvaluationCrop) and crop.resize is None:
        assert off.max() == 0  # nothing is resampled, and the decoders agree to the level


@pytest.mark.usefixtures("dali")
def test_dali_does_not_depend_on_company_threads_or_damaged_neighbours(folder, tmp_path):
    crop = DiffusionCrop(64)
    files = list_images(folder)
    expected = make_reader("dali", crop)(files)
    reader = make_reader("dali", crop, threads=1)
    assert differences([reader([file])[0] for file in files], expected).max() == 0
    whole = files[0].path.read_bytes()
    # a header that lies, and a Huffman table that is none: DALI fails on these, and with them on a whole call
    for name, data in {"lie": b"\xff\xd8\xff\xd9", "table": whole[:40] + bytes(200) + whole[240:]}.items():
        (tmp_path / f"{name}.jpg").write_bytes(data)
    bad = list_images(tmp_path)
    images = reader([bad[0], *files, bad[1]])
    assert differences(images[1:-1], expected).max() == 0
    for image, name in ((images[0], "lie.jpg"), (images[-1], "table.jpg")):
        assert isinstance(image, SdaError)
        assert name in str(image)


@pytest.mark.usefixtures("dali")
def test_both_readers_refuse_the_same_files(folder, tmp_path):
    whole = (folder / "0-default.jpg").read_bytes()
    for length in (0, 2, 30, len(whole) // 2, len(whole) - 2):
        (tmp_path / f"cut{length}.jpg").write_bytes(whole[:length])
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "tail.jpg").write_bytes(whole + bytes(9))
    files = list_images(tmp_path)
    verdicts = [[str(x) for x in make_reader(d, DiffusionCrop(64))(files)] for d in ("pillow", "dali")]
    assert verdicts[0][:-2] == verdicts[1][:-2]
    kinds = [[isinstance(x, SdaError) for x in make_reader(d, DiffusionCrop(64))(files)] for d in ("pillow", "dali")]
    assert kinds == [[name.startswith(("cut", "text")) for name in sorted(os.listdir(tmp_path))]] * 2


@pytest.mark.usefixtures("dali")
def test_the_decoder_is_a_setting_of_align(tmp_path, tiny, write_images):
    images = write_images(tmp_path / "images", [f"a/{i}.jpg" for i in range(3)], size=(30, 40))
    settings = {name: AlignSettings(respacing="10", start=1, decoder=name) for name in ("pillow", "dali")}
    for name in settings:
        align(images, tmp_path / name, tiny.adm, settings[name])
        assert json.loads((tmp_path / name / "manifest.json").read_text())["settings"]["decoder"] == name
        assert len(list_images(tmp_path / name)) == 3
    with pytest.raises(SdaError, match='made with decoder = "pillow", this run has decoder = "dali"'):
        align(images, tmp_path / "pillow", tiny.adm, settings["dali"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("dali")
def test_gpu_decoding_is_close(folder):
    files = list_images(folder)
    off = differences(*(make_reader(name, DiffusionCrop(64))(files) for name in ("dali-gpu", "pillow")))
    assert off.mean(axis=(1, 2, 3)).max() <= GPU_MEAN


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.usefixtures("dali")
def test_gpu_decoding_without_a_gpu_is_refused():
    with pytest.raises(SdaError, match='"dali-gpu" needs an NVIDIA GPU'):
        make_reader("dali-gpu", DiffusionCrop(64))


def test_a_missing_dali_is_one_sentence_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(SdaError, match=r'cannot be imported \(.*\): pip install "sda-fast\[dali\]"$'):
        make_reader("dali", DiffusionCrop(64))


def test_strips_that_cannot_be_enlarged_are_named(tmp_path):
    Image.new("RGB", (20000, 1)).save(tmp_path / "strip.png")
    for crop in (DiffusionCrop(256), EvaluationCrop(224, 256)):
        (error,) = make_reader("pillow", crop)(list_images(tmp_path))
        assert "strip.png: a picture of 20000x1 is too long and narrow (enlarged to 5120000x256" in str(error)


def test_listing_with_failures(tmp_path):
    photo(8, 8).save(tmp_path / "a.png")
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    os.mkfifo(tmp_path / "pipe.txt")
    files, failures = find_images(tmp_path)
    assert [file.name for file in files] == ["a.png"]
    assert failures.keys() == {"empty/deeper/", "pipe.png", "link.png"}


BATCHES = [[f"{i}a", f"{i}b"] for i in range(7)]


def test_prefetcher_reads_ahead_but_not_further():
    begun, go = [], threading.Event()

    def read(batch):
        begun.append(batch)
        go.wait(10)
        return "".join(batch)

    prefetched = Prefetcher(read, BATCHES, depth=2)
    go.set()
    assert prefetched(BATCHES[0]) == "0a0b"
    deadline = time.monotonic() + 10
    while len(begun) < 3 and time.monotonic() < deadline:  # nobody asked for these two yet
        time.sleep(0.001)
    assert begun == BATCHES[:3]
    assert [prefetched(batch) for batch in BATCHES[1:]] == ["".join(batch) for batch in BATCHES[1:]]
    assert begun == BATCHES


def test_prefetcher_gives_what_was_asked_for_in_any_order():
    prefetched = Prefetcher("".join, BATCHES)
    order = [*BATCHES[::-1], ["x"], BATCHES[2]]
    assert [prefetched(batch) for batch in order] == ["".join(batch) for batch in order]


def test_prefetcher_hands_on_errors():
    def read(batch):
        raise SdaError(f"no {batch[0]}")

    prefetched = Prefetcher(read, BATCHES)
    for batch in BATCHES[:4]:
        with pytest.raises(SdaError, match=f"no {batch[0]}"):
            prefetched(batch)
