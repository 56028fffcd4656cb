"""align and synthesize under torchrun: one, two and three processes, one of them killed, and what they refuse."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from sda_fast.errors import SdaError
from sda_fast.stages import ranks
from sda_fast.stages.align import AlignSettings, align

ALIGN = AlignSettings(respacing="10", start=3, factor=2, batch_size=2)


@pytest.fixture
def images(tmp_path, write_images):
    return write_images(tmp_path / "images", [f"{i}.png" for i in range(7)], size=(20, 24))


@pytest.fixture
def kills():
    """The script benchmarks/kills.py."""
    path = Path(__file__).parents[2] / "benchmarks" / "kills.py"
    spec = importlib.util.spec_from_file_location("kills", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kills"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["kills"]


TORCHRUN = [sys.executable, "-P", "-m", "torch.distributed.run"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(processes, logs, *arguments):
    options = ["--standalone", "--nproc-per-node", processes, "--log-dir", logs]
    command = map(str, [*TORCHRUN, *options, "-m", "--", "sda_fast", *arguments])
    return subprocess.run(list(command), capture_output=True, text=True, env=ENVIRONMENT, timeout=300)


def align_options(images, output, adm):
    return ["align", "-i", images, "-o", output, "--adm", adm, *["--respacing", "10", "--start", "3", "--factor", "2"]]


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_makes_the_same_files(tmp_path, images, tiny, pictures, processes):
    align(images, tmp_path / "one", tiny.adm, ALIGN)
    (images / "broken.png").write_bytes(b"no picture")
    run = torchrun(processes, tmp_path / "logs", *align_options(images, tmp_path / "out", tiny.adm), "--batch-size", 2)
    assert pictures(tmp_path / "out") == pictures(tmp_path / "one"), run.stderr
    # Once, and not by every process; what could not be read is every process's failure.
    assert run.stdout.count("images in") == 1, run.stderr
    assert "broken.png" in (tmp_path / "out" / "failures.json").read_text()
    assert run.returncode != 0
    assert '"failed": 1' in (tmp_path / "out" / "manifest.json").read_text()


def test_synthesis_is_shared_too_and_survives_kills(kills):
    """Two processes, killed twice, make the files of one: a piece of what benchmarks/results/kills.json holds."""
    command = [sys.executable, "-P", kills.__file__, "--stage", "synthesize", "--kills", "2", "--images", "1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    row = json.loads(run.stdout)["stages"]["synthesize"]
    assert row.items() >= {"kills": 2, "images_per_folder": 14, "identical": True, "difference": None}.items()
    assert row["before_the_first_image"] < 2


def test_no_difference_between_folders_is_overlooked(tmp_path, kills):
    manifest = {"created": "1", "settings": {"seed": 0}, "finished": {"at": "1", "images": 2}}
    for name in ("one", "two"):
        folder = tmp_path / name / "a"
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(b"1")
        (folder.parent / "manifest.json").write_text(json.dumps(manifest))
    expected, two = kills.contents(tmp_path / "one"), tmp_path / "two"

    def difference():
        return kills.first_difference(expected, kills.contents(two))

    (two / "manifest.json").write_text(json.dumps({**manifest, "created": "2", "finished": {"at": "2", "images": 2}}))
    assert difference() is None
    (two / "manifest.json").write_text(json.dumps({**manifest, "finished": {"at": "2", "images": 1}}))
    assert difference() == "manifest.json differs"
    (two / "a" / "1.png").write_bytes(b"2")
    assert difference() == "a/1.png differs"
    (two / "a" / ".sda-0-1-2.tmp").touch()
    assert difference() == "a/.sda-0-1-2.tmp should not be there"
    (two / "a" / ".sda-0-1-2.tmp").unlink()
    (two / "a" / "1.png").unlink()
    assert difference() == "a/1.png is missing"


class FakeStore:
    """The store of torch.distributed as one process sees it."""

    def __init__(self):
        self.values = {}

    def set(self, key, value):
        self.values[key] = value

    def get(self, key):
        return self.values[key]

    def add(self, key, n):
        self.values[key] = self.values.get(key, 0) + n
        return self.values[key]


def test_work_is_handed_out_once_and_in_turn():
    store = FakeStore()
    first, second = (ranks.Ranks(store, rank, 2) for rank in range(2))
    assert first.share([1, "a"]) == second.share(None) == [1, "a"]
    mine, theirs = first.take(4), second.take(4)
    assert [next(mine), next(theirs), next(theirs), next(mine)] == [0, 1, 2, 3]
    assert next(mine, None) is next(theirs, None) is None
    a, b = first.total(), second.total()
    assert [a.add(2), b.add(3), a.add(1)] == [2, 5, 6]
    assert first.first
    assert not second.first


def meet(store, size):
    """The number that all of `size` processes agree on."""
    with ThreadPoolExecutor(size) as pool:
        (number,) = set(pool.map(lambda rank: ranks._meet(store, rank, size), range(size)))
    return number


def test_processes_that_are_started_again_agree_on_another_number():
    store = torch.distributed.HashStore()
    numbers = [meet(store, 3)]
    store.add("starts-0", 1)  # some were started again, and were gone before they met
    store.add("starts-2", 1)
    numbers += [meet(store, 3), meet(store, 2), meet(store, 3)]
    assert len(set(numbers)) == 4


MACHINE = """
import os, signal, sys
from pathlib import Path
from sda_fast.stages.ranks import ranks

others, once = ranks(), Path(sys.argv[1])
taken = others.gather(list(others.take(4)))
if others.rank == 1 and not once.exists():
    once.touch()
    os.kill(os.getpid(), signal.SIGKILL)
others.gather(None)
print(sorted(sum(taken, [])))
"""


def test_machines_that_count_their_restarts_apart_meet_again(tmp_path):
    """A process dies: its machine counts a restart, the other one starts its own process again uncounted."""
    (tmp_path / "machine.py").write_text(MACHINE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--log-dir", tmp_path / "logs"]
    options = ["--nnodes", "2", "--max-restarts", "1", *where, tmp_path / "machine.py", tmp_path / "once"]
    command, pipe = list(map(str, [*TORCHRUN, *options])), subprocess.PIPE
    machines = [subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT) for _ in range(2)]
    try:
        said = [machine.communicate(timeout=120) for machine in machines]
    finally:
        for machine in machines:
            machine.terminate()  # which ends its process too
    assert [out for out, _ in said] == ["[0, 1, 2, 3]\n"] * 2, said
    assert sum("exitcode: -9" in errors for _, errors in said) == 1


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    ranks.ranks.cache_clear()
    yield
    ranks.ranks.cache_clear()


def test_processes_that_torchrun_did_not_start(two_processes, monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SdaError, match=r"WORLD_SIZE is 2, but the processes do not meet .*: start them with torchrun"):
        ranks.alone("evaluate")


def test_processes_that_torchrun_left_behind(two_processes, monkeypatch):
    """It was killed while they started, and its store, for which the first of many machines is waited long, is gone."""
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))  # and nobody listens
        port = unheard.getsockname()[1]
        values = {"RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(ranks, "_GREETING", timedelta(seconds=1))
        with pytest.raises(SdaError, match=r"the processes do not meet \(.*1000ms.*\): start them with torchrun"):
            ranks.is_first()


def test_what_does_not_go_with_several_processes(tmp_path, tiny, images, monkeypatch):
    store = FakeStore()
    all_of_them = ranks.Ranks(store, 0, 2)
    monkeypatch.setattr("sda_fast.stages.ranks.ranks", lambda: all_of_them)
    monkeypatch.setattr("sda_fast.stages.batches.ranks", lambda: all_of_them)
    with pytest.raises(SdaError, match="evaluate runs in one process: call it without torchrun"):
        ranks.alone("evaluate")
    with pytest.raises(SdaError, match="--workers 2 and torchrun exclude each other"):
        align(images, tmp_path / "out", tiny.adm, ALIGN, workers=2)
