import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sda_fast.errors import SdaError
from sda_fast.stages.batches import plan, run_batches

HERE = Path(__file__).parent


@pytest.fixture
def work(monkeypatch):
    """The functions of batch_work.py, importable here and in worker processes."""
    monkeypatch.syspath_prepend(HERE)
    import batch_work

    return batch_work


def run(make, folder, batches, **options):
    run_batches(batches, make, (folder,), label="test", total=sum(map(len, batches)), **options)


@pytest.mark.parametrize(
    ("groups", "done", "size", "expected"),
    [
        (["a", "b", "c", "d", "e"], "", 2, ["ab", "cd", "e"]),
        (["a", "b", "c", "d", "e"], "bd", 2, ["ac", "e"]),
        (["a", "b", "c", "d", "e"], "abcde", 2, []),
        ([], "", 2, []),
        (["ab", "cd", "e"], "", 2, ["ab", "cd", "e"]),
        (["ab", "cd", "e"], "", 4, ["abcd", "e"]),
        (["ab", "cd", "e"], "", 5, ["abcde"]),
        (["ab", "cd", "ef"], "cdf", 4, ["abef"]),
        (["ab", "cd", "ef"], "a", 2, ["ab", "cd", "ef"]),  # a group with anything to do is done whole
        (["ab", "cd", "ef"], "", 3, ["ab", "cd", "ef"]),  # and never cut
    ],
)
def test_plan(groups, done, size, expected):
    batches = plan([list(group) for group in groups], lambda key: key in done, size)
    assert ["".join(batch) for batch in batches] == expected


def test_batches_are_done_in_order_by_work_made_once():
    made, seen = [], []

    def make(folder):
        made.append(folder)
        return seen.append

    run(make, "x", [["a", "b"], ["c"], ["d"]])
    assert made == ["x"]
    assert seen == [["a", "b"], ["c"], ["d"]]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_process_computes_with_one_thread(tmp_path, work, workers):
    """Otherwise last bits would depend on the number of workers and of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run(work.counting, tmp_path, [["a"], ["b"]], workers=workers)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert {file.read_text() for file in tmp_path.iterdir()} == {"1"}


def test_nothing_is_made_where_nothing_is_to_do():
    run(lambda folder: pytest.fail("made"), "x", [])


@pytest.mark.parametrize("workers", [0, -1])
def test_too_few_workers(workers):
    with pytest.raises(SdaError, match=rf"--workers {workers} is out of range: give at least 1"):
        run(lambda folder: pytest.fail("made"), "x", [["a"]], workers=workers)


def test_several_workers_do_what_one_does(tmp_path, work):
    run(work.writer, tmp_path, [["a", "b"], ["c"], ["d", "e"]], workers=2)
    assert sorted(os.listdir(tmp_path)) == list("abcde")
    assert str(os.getpid()) not in {file.read_text() for file in tmp_path.iterdir()}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("make", "message"),
    [("refusing", "c is no picture: remove it."), ("unmade", "these weights are torn: fetch them again.")],
)
def test_an_error_in_a_worker_is_the_same_sentence(tmp_path, work, capfd, make, message, workers):
    with pytest.raises(SdaError) as error:
        run(getattr(work, make), tmp_path, [["a"], ["c"], ["d"]], workers=workers)
    assert str(error.value) == message
    assert capfd.readouterr() == ("", "")


def test_a_worker_that_dies_is_reported(tmp_path, work):
    with pytest.raises(SdaError, match=r"^a worker process died.*run the same command again.*fewer --workers"):
        run(work.dying, tmp_path, [["a"], ["b"]], workers=2)


SCRIPT = """
import sys
from pathlib import Path
import batch_work
from sda_fast.stages.batches import run_batches
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    run_batches([["a"], ["b"], ["c"]], batch_work.endless, (folder,), label="test", total=3, workers=2)
"""


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent_and_in_silence(tmp_path, signal_number):
    """Ctrl-C reaches the whole process group, as from a terminal; a killed parent can tell nobody."""
    (tmp_path / "script.py").write_text(SCRIPT)
    folder = tmp_path / "out"
    folder.mkdir()
    command = [sys.executable, tmp_path / "script.py", folder]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    parent = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True)
    until(lambda: len(read(folder)) == 2 or parent.poll() is not None)
    workers = read(folder)
    assert len(workers) == 2, parent.stderr.read()
    if signal_number == signal.SIGINT:
        os.killpg(parent.pid, signal_number)
    else:
        parent.kill()
    _, errors = parent.communicate(timeout=60)
    assert parent.returncode == -signal_number
    assert errors.count("Traceback") == (signal_number == signal.SIGINT)  # the parent's own
    until(lambda: not any(alive(pid) for pid in workers))


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def read(folder):
    return [int(text) for file in folder.iterdir() if (text := file.read_text())]


def until(condition):
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)
