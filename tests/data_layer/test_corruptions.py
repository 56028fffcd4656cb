import hashlib
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest

from sda_fast.data import CORRUPTIONS, corrupt, corruptions
from sda_fast.errors import SdaError

pytest.importorskip("imagecorruptions", reason='needs pip install "sda-fast[photos]"')

SEEDLESS = ("brightness", "contrast", "defocus_blur", "zoom_blur", "pixelate", "jpeg_compression")


def image(side: int, wide: int = 0) -> np.ndarray:
    y, x = np.mgrid[:side, : side + wide] / side
    waves = np.stack([np.sin(9 * x + 4 * y), np.cos(7 * y), np.sin(20 * x * y)], axis=-1)
    return (127 + 100 * waves).astype(np.uint8)


def digests() -> list[str]:
    """One line per corruption, for the comparison between processes."""
    return [hashlib.sha256(corrupt(image(32), name, 3, 2**62 + 5)).hexdigest() for name in CORRUPTIONS]


def test_the_fifteen_are_those_of_the_library_in_the_official_order():
    from imagecorruptions import get_corruption_names

    assert list(CORRUPTIONS) == get_corruption_names("common")


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize(("side", "wide"), [(32, 0), (32, 17), (224, 0)])
def test_every_corruption_at_every_severity(name, side, wide, capfd):
    clean = image(side, wide)
    copy = clean.copy()
    distances = []
    for severity in range(1, 6):
        result = corrupt(clean, name, severity, seed=7)
        assert result.dtype == np.uint8
        assert result.shape == clean.shape
        assert result.flags.carray
        distances.append(np.abs(result.astype(int) - clean).mean())
    assert min(distances) > 0.2
    assert distances[4] > distances[0] or name == "frost"  # which of six frost images counts for more there
    np.testing.assert_array_equal(clean, copy)
    assert capfd.readouterr().out == ""  # standard output may carry JSON


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_result_depends_on_the_seed_and_on_nothing_else(name):
    clean = image(32)
    first = corrupt(clean, name, 4, 1)
    np.random.seed(3)
    random.seed(3)
    states = np.random.get_state(), random.getstate()
    other = corrupt(image(40), CORRUPTIONS[CORRUPTIONS.index(name) - 1], 2, 9)
    assert other.shape == (40, 40, 3)
    np.testing.assert_array_equal(corrupt(clean, name, 4, 1), first)
    np.testing.assert_array_equal(corrupt(np.asfortranarray(clean), name, 4, np.int64(1)), first)
    after = np.random.get_state(), random.getstate()
    assert all(np.array_equal(a, b) for a, b in zip(states[0], after[0], strict=True))
    assert states[1] == after[1]
    assert np.array_equal(corrupt(clean, name, 4, 2), first) == (name in SEEDLESS)


def test_threads_do_not_disturb_each_other():
    names = ("gaussian_noise", "snow", "glass_blur")
    tasks = [(image(32), name, 3, seed) for name in names for seed in range(40)]
    alone = [corrupt(*task) for task in tasks]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda task: corrupt(*task), tasks))
    np.testing.assert_array_equal(together, alone)


def test_large_seeds_differ_in_every_bit():
    results = {corrupt(image(32), "impulse_noise", 5, seed).tobytes() for seed in (0, 1, 2**32, 2**62, 2**62 + 1)}
    assert len(results) == 5


def test_corruptions_of_one_image_do_not_share_their_noise():
    grey = np.full((64, 64, 3), 128, np.uint8)
    fields = [corrupt(grey, "gaussian_noise", s, 0).astype(float).ravel() - 128 for s in (1, 5)]
    assert abs(np.corrcoef(fields)[0, 1]) < 0.05


def test_another_process_draws_the_same_in_another_order():
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('t', sys.argv[1])\n"
        "t = importlib.util.module_from_spec(spec); spec.loader.exec_module(t)\n"
        "for name in reversed(t.CORRUPTIONS): t.corrupt(t.image(33), name, 5, 0)\n"
        "print('\\n'.join(t.digests()))\n"
    )
    there = subprocess.run([sys.executable, "-c", code, __file__], capture_output=True, text=True, check=True)
    assert there.stdout.split() == digests()


def test_wrong_arguments_are_named():
    clean = image(32)
    cases = [
        ((clean, "rain", 1, 0), "no corruption 'rain'"),
        ((clean, "fog", 0, 0), "not 0"),
        ((clean, "fog", 6, 0), "not 6"),
        ((clean[:31], "fog", 1, 0), "not 32x31"),
        ((clean / 255, "fog", 1, 0), "float64"),
        ((clean[..., 0], "fog", 1, 0), r"\[32, 32\]"),
    ]
    for arguments, message in cases:
        with pytest.raises(SdaError, match=message):
            corrupt(*arguments)


@pytest.fixture
def forgotten():
    corruptions._load.cache_clear()
    yield
    corruptions._load.cache_clear()


@pytest.mark.usefixtures("forgotten")
def test_a_missing_library_is_one_sentence_with_the_command(monkeypatch):
    def nothing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(corruptions, "version", nothing)
    with pytest.raises(SdaError, match=r'pip install "sda-fast\[photos\]"\.$'):
        corrupt(image(32), "fog", 1, 0)


@pytest.mark.usefixtures("forgotten")
def test_a_library_that_does_not_load_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(SdaError, match=r'cannot be imported \(.*\): pip install "sda-fast\[photos\]"\.$'):
        corrupt(image(32), "fog", 1, 0)


def test_the_library_is_not_loaded_before_it_is_used():
    code = "import sys, sda_fast.data; sys.exit(len({'imagecorruptions', 'numba', 'cv2'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
