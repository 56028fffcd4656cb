import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time

import pytest

from sda_fast.stages.progress import Reporter, progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until told otherwise."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    return Clock


def test_rate_and_remaining_time(clock):
    reporter = Reporter(100)
    assert reporter.rate is None
    assert reporter.remaining is None
    assert str(reporter) == "0/100"
    clock.now += 10
    reporter.advance(5)
    assert reporter.rate == 0.5
    assert reporter.remaining == 190
    assert str(reporter) == "5/100  0.5 images/s  0:03:10 left"


def test_what_an_earlier_run_did_counts_as_done_but_not_in_the_rate(clock):
    reporter = Reporter(100, done=50)
    reporter.skip(30)
    clock.now += 2
    reporter.advance(10)
    assert reporter.done == 90
    assert reporter.rate == 5
    assert reporter.remaining == 2


def test_a_slow_start_is_forgotten(clock):
    reporter = Reporter(1000)
    clock.now += 600
    for _ in range(40):
        reporter.advance()
        clock.now += 1
    assert reporter.rate == pytest.approx(1)


def test_odd_totals(clock):
    reporter = Reporter(0)
    clock.now += 1
    reporter.advance(3)
    assert reporter.remaining == 0
    assert str(reporter) == "3/0  3 images/s  0:00:00 left"
    reporter.advance(12345)
    assert "12348 images/s" in str(reporter)


def test_threads_lose_no_count():
    reporter = Reporter(8000)
    threads = [threading.Thread(target=lambda: [reporter.advance() for _ in range(1000)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reporter.done == 8000


def test_nothing_is_written_where_there_is_no_terminal(capsys):
    stream = io.StringIO()
    for quiet in (None, True, False):
        with progress(3, "align", quiet=quiet, stream=stream) as reporter:
            reporter.advance(3)
        assert reporter.done == 3
    with progress(3, "align") as reporter:
        reporter.advance(1)
    assert stream.getvalue() == ""
    assert capsys.readouterr() == ("", "")


SHOW = """
import json, sys, time
from sda_fast.stages.progress import progress
with progress(40, "align [x]", quiet=None if sys.argv[1] == "shown" else True, done=20) as reporter:
    for _ in range(10):
        time.sleep(0.02)
        reporter.advance(2)
    print(json.dumps({"done": reporter.done}))
"""


def on_a_terminal(mode: str, **environment: str) -> tuple[str, str]:
    """Standard output (a pipe) and what a terminal on standard error received."""
    master, slave = pty.openpty()
    shown = b""
    process = subprocess.Popen(
        [sys.executable, "-c", SHOW, mode],
        stdout=subprocess.PIPE,
        stderr=slave,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"} | environment,
    )
    os.close(slave)
    try:
        while chunk := os.read(master, 4096):
            shown += chunk
    except OSError:  # the other end was closed
        pass
    os.close(master)
    out = process.communicate()[0]
    assert process.returncode == 0, shown
    return out.decode(), shown.decode()


def test_a_terminal_shows_count_rate_and_remaining_time():
    out, shown = on_a_terminal("shown")
    assert json.loads(out) == {"done": 40}  # standard output is not touched
    assert "align [x]" in shown
    assert re.search(r"40/40  [\d.]+ images/s  0:00:00 left", shown)
    rate = float(re.findall(r"40/40  ([\d.]+) images/s", shown)[-1])
    assert 1 < rate <= 100  # two images each 0.02 s or more; the twenty done before are not in it


def test_a_quiet_terminal_shows_nothing():
    assert on_a_terminal("quiet")[1] == ""


def test_a_failure_passes_through():
    with pytest.raises(KeyError), progress(3, "align"):
        raise KeyError
