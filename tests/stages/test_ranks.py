"""align and synthesize under torchrun: one, two and three processes, one of them killed, and what they refuse."""

import os
import subprocess
import sys

import pytest

from sda_fast.errors import SdaError
from sda_fast.stages import ranks
from sda_fast.stages.align import AlignSettings, align
from sda_fast.stages.synthesize import SynthesizeSettings, synthesize

ALIGN = AlignSettings(respacing="10", start=3, factor=2, batch_size=2)


@pytest.fixture
def images(tmp_path, write_images):
    return write_images(tmp_path / "images", [f"{i}.png" for i in range(7)], size=(20, 24))


def torchrun(processes, *arguments):
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [*command, "-m", "--", "sda_fast", *map(str, arguments)]
    return subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=300)


def align_options(images, output, adm):
    return ["align", "-i", images, "-o", output, "--adm", adm, *["--respacing", "10", "--start", "3", "--factor", "2"]]


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_makes_the_same_files(tmp_path, images, tiny, pictures, processes):
    align(images, tmp_path / "one", tiny.adm, ALIGN)
    (images / "broken.png").write_bytes(b"no picture")
    run = torchrun(processes, *align_options(images, tmp_path / "out", tiny.adm), "--batch-size", 2)
    assert pictures(tmp_path / "out") == pictures(tmp_path / "one"), run.stderr
    # Once, and not by every process; what could not be read is every process's failure.
    assert run.stdout.count("images in") == 1, run.stderr
    assert "broken.png" in (tmp_path / "out" / "failures.json").read_text()
    assert run.returncode != 0
    assert '"failed": 1' in (tmp_path / "out" / "manifest.json").read_text()


def test_synthesis_is_shared_too(tmp_path, tiny, pictures):
    settings = SynthesizeSettings(respacing="10", batch_size=2)
    synthesize(tmp_path / "one", tiny.dit, 3, settings=settings)
    options = ["--per-class", 3, "--respacing", 10, "--batch-size", 2]
    run = torchrun(2, "synthesize", "-o", tmp_path / "out", "--dit", tiny.dit, *options)
    assert run.returncode == 0, run.stderr
    assert pictures(tmp_path / "out") == pictures(tmp_path / "one"), run.stderr


class FakeStore:
    """The store of torch.distributed as one process sees it."""

    def __init__(self):
        self.values, self.set_timeout = {}, lambda timeout: None

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


def test_what_does_not_go_with_several_processes(tmp_path, tiny, images, monkeypatch):
    store = FakeStore()
    all_of_them = ranks.Ranks(store, 0, 2)
    monkeypatch.setattr("sda_fast.stages.ranks.ranks", lambda: all_of_them)
    monkeypatch.setattr("sda_fast.stages.batches.ranks", lambda: all_of_them)
    with pytest.raises(SdaError, match="evaluate runs in one process: call it without torchrun"):
        ranks.alone("evaluate")
    with pytest.raises(SdaError, match="--workers 2 and torchrun exclude each other"):
        align(images, tmp_path / "out", tiny.adm, ALIGN, workers=2)
