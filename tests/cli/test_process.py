"""What only a process of its own shows: exit codes, what stays off standard error, Ctrl-C and closed pipes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from sda_fast.stages.align import AlignSettings, align

COMMAND = [sys.executable, "-m", "sda_fast"]


def sda_fast(*arguments, **options):
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, **options)


@pytest.fixture
def images(tmp_path, write_images):
    return write_images(tmp_path / "images", [f"{name}/{i}.png" for name in ("ant", "cow") for i in range(4)])


def test_json_and_nothing_else(tmp_path, tiny, images):
    options = ("-i", images, "-o", tmp_path / "out", "--adm", tiny.adm, "--respacing", 10, "--start", 2)
    done = sda_fast("align", *options, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"images": 8, "projected": 8, "failed": 0, "output": str(tmp_path / "out")}


def test_help_answers_without_torch():
    started = time.perf_counter()
    code = """
import sys, sda_fast.cli
sys.argv = ["sda-fast", "align", "--help"]
try:
    sda_fast.cli.main()
finally:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("False\n")
    assert "Usage: sda-fast align" in done.stdout
    assert time.perf_counter() - started < 5


def test_debug_shows_where_a_mistake_was_noticed(tmp_path, tiny):
    options = ("align", "-i", tmp_path / "none", "-o", tmp_path / "out", "--adm", tiny.adm)
    quiet, loud = sda_fast(*options), sda_fast("--debug", *options)
    sentence = f"--input {tmp_path / 'none'} does not exist: check the path."
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (2, "", f"sda-fast: {sentence}\n")
    assert (loud.returncode, loud.stdout) == (2, "")
    assert loud.stderr.startswith("Traceback (most recent call last):")
    assert loud.stderr.endswith(f"sda_fast.errors.SdaError: {sentence}\nsda-fast: {sentence}\n")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"])
def test_interrupted(tmp_path, tiny, images, pictures, workers, number, code):
    """By a terminal, which tells the whole process group, and by a batch system, which may tell the command alone.

    The run goes on later as if nothing had been.
    """
    settings = AlignSettings(respacing="100", start=60, batch_size=2)
    arguments = ["align", "-i", images, "-o", tmp_path / "out", "--adm", tiny.adm, "--workers", workers]
    arguments += ["--start", "60", "--batch-size", "2"]
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not pictures(tmp_path / "out") and process.poll() is None:
        time.sleep(0.01)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "")
    assert err == "sda-fast: interrupted; the same command goes on from here.\n"
    assert 0 < len(pictures(tmp_path / "out")) < 8
    if workers == 1:
        assert align(images, tmp_path / "out", tiny.adm, settings)["projected"] < 8
        align(images, tmp_path / "whole", tiny.adm, settings)
        assert pictures(tmp_path / "out") == pictures(tmp_path / "whole")


def test_a_reader_that_goes_away_is_no_error():
    with subprocess.Popen([*COMMAND, "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
