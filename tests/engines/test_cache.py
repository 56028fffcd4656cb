"""The cache of built engines: nothing damaged or foreign is ever given out, nothing half-written stays."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sda_fast.engines import cache as module
from sda_fast.engines.cache import EngineCache, default_folder
from sda_fast.errors import SdaError

SETTINGS = {"kind": "plan", "graph": "abc", "profiles": {"x": [[1], [2], [3]]}}
PLAN = bytes(range(256)) * 8


def never(work):
    raise AssertionError("built although it was there")


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "engines")


def entry(cache):
    (plan,), (record,) = cache.folder.glob("*.plan"), cache.folder.glob("*.json")
    return plan, record


def test_an_entry_is_found_again_by_its_settings_alone(cache):
    assert cache.obtain(SETTINGS, lambda work: PLAN) == PLAN
    assert EngineCache(cache.folder).obtain(dict(reversed(SETTINGS.items())), never) == PLAN
    assert cache.find(SETTINGS) == PLAN
    assert cache.find({**SETTINGS, "graph": "abd"}) is None
    assert cache.obtain({**SETTINGS, "graph": "abd"}, lambda work: b"other") == b"other"
    assert cache.obtain(SETTINGS, never) == PLAN


def truncated(plan, record):
    plan.write_bytes(plan.read_bytes()[:-1])


def one_bit_flipped(plan, record):
    content = bytearray(plan.read_bytes())
    content[1000] ^= 1
    plan.write_bytes(content)


def emptied(plan, record):
    plan.write_bytes(b"")


def of_another_version(plan, record):
    found = json.loads(record.read_text())
    record.write_text(json.dumps({**found, "settings": {**found["settings"], "tensorrt": "10.0"}}))


def without_record(plan, record):
    record.unlink()


def without_plan(plan, record):
    plan.unlink()


def record_truncated(plan, record):
    record.write_bytes(record.read_bytes()[:40])


def record_of_another_kind(plan, record):
    record.write_text("[]")


def record_not_text(plan, record):
    record.write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(
    "damage",
    [
        *(truncated, one_bit_flipped, emptied, of_another_version, without_record, without_plan),
        *(record_truncated, record_of_another_kind, record_not_text),
    ],
    ids=lambda damage: damage.__name__,
)
def test_what_is_damaged_is_built_again_with_one_line_of_warning(cache, caplog, damage):
    cache.obtain(SETTINGS, lambda work: PLAN)
    damage(*entry(cache))
    assert cache.find(SETTINGS) is None
    caplog.clear()
    assert cache.obtain(SETTINGS, lambda work: PLAN[::-1]) == PLAN[::-1]
    (line,) = caplog.messages
    assert "is not as it was stored" in line
    assert "\n" not in line
    caplog.clear()
    assert cache.obtain(SETTINGS, never) == PLAN[::-1]
    assert not caplog.messages


def test_a_plan_of_other_settings_under_this_name_is_not_taken(cache):
    """As if somebody renamed it."""
    cache.store({"kind": "another"}, b"another plan")
    names = entry(cache)
    cache.obtain(SETTINGS, lambda work: PLAN)
    for old in names:
        (new,) = (p for p in cache.folder.glob(f"*{old.suffix}") if p != old)
        os.replace(old, new)
    assert cache.find(SETTINGS) is None


def test_what_was_refused_is_built_again_but_not_what_replaced_it(cache):
    cache.store(SETTINGS, b"refused")
    assert cache.obtain(SETTINGS, lambda work: PLAN, refused=b"refused") == PLAN
    assert cache.obtain(SETTINGS, never, refused=b"refused") == PLAN


def test_a_build_that_fails_leaves_nothing(cache):
    def fails(work):
        (work / "step.onnx").write_bytes(b"gigabytes")
        raise SdaError("TensorRT could not build an engine")

    with pytest.raises(SdaError, match="could not build"):
        cache.obtain(SETTINGS, fails)
    assert [p.suffix for p in cache.folder.iterdir()] == [".lock"]
    assert cache.obtain(SETTINGS, lambda work: PLAN) == PLAN


def test_work_is_done_in_an_empty_folder_that_goes_afterwards(cache):
    def build(work):
        assert list(work.iterdir()) == []
        (work / "step.onnx").write_bytes(b"gigabytes")
        return PLAN

    cache.obtain(SETTINGS, build)
    assert sorted(p.suffix for p in cache.folder.iterdir()) == [".json", ".lock", ".plan"]


# ---- the folder -------------------------------------------------------------------------------------------------


def test_the_folder_is_its_users_alone(tmp_path):
    umask = os.umask(0)
    try:
        folder = EngineCache(tmp_path / "a" / "engines").folder
    finally:
        os.umask(umask)
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_folder_that_others_may_write_is_refused(tmp_path, mode):
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines").chmod(mode)
    with pytest.raises(SdaError, match="can be written by others: chmod 700"):
        EngineCache(tmp_path / "engines")


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    (tmp_path / "engines").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(SdaError, match="belongs to another user: set SDA_FAST_CACHE"):
        EngineCache(tmp_path / "engines")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SdaError, match=r"file/engines cannot be made \(.*\): set SDA_FAST_CACHE"):
        EngineCache(tmp_path / "file" / "engines")


def test_where_it_is_by_default(monkeypatch, tmp_path):
    monkeypatch.setenv("SDA_FAST_CACHE", str(tmp_path))
    assert default_folder() == tmp_path / "engines"
    monkeypatch.delenv("SDA_FAST_CACHE")
    assert default_folder() == Path.home() / ".cache" / "sda_fast" / "engines"


def test_a_full_disk_is_a_sentence_and_keeps_what_was_there(cache, monkeypatch):
    cache.store(SETTINGS, PLAN)

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SdaError, match="No space left on device"):
        cache.store(SETTINGS, b"new")
    monkeypatch.undo()
    assert cache.find(SETTINGS) == PLAN


# ---- several processes ------------------------------------------------------------------------------------------

PROCESS = """
import importlib.util, os, sys, time
from pathlib import Path

# By its file: the package around it imports torch, which takes seconds.
spec = importlib.util.spec_from_file_location("cache", {module!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

SETTINGS = {settings!r}
cache = module.EngineCache(Path({folder!r}))

def build(work):
    (work / "step.onnx").write_bytes(b"gigabytes")
    with open({folder!r} + "/../builds", "a") as file:
        file.write("built\\n")
    print("building", flush=True)
    sys.stdin.readline()
    return {plan!r}

{extra}
print(cache.obtain(SETTINGS, build) == {plan!r}, flush=True)
"""
# Stops for ever in the middle of the given function of `os`, of which the first `skip` calls are let pass.
STOP = """
real, seen = os.{function}, []
def stop(*arguments):
    seen.append(1)
    if len(seen) <= {skip}:
        return real(*arguments)
    print("stopped", flush=True)
    time.sleep(600)
os.{function} = stop
"""


@pytest.fixture
def start(cache):
    """start(extra): a process that obtains the entry; its build waits for a line of input."""
    processes = []

    def start(extra=""):
        code = PROCESS.format(
            module=module.__file__, settings=SETTINGS, folder=str(cache.folder), plan=PLAN, extra=extra
        )
        command = [sys.executable, "-P", "-c", code]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_of_two_processes_one_builds_and_the_other_waits(cache, start):
    processes = start(), start()
    for process in processes:
        process.stdin.write("go on\n")
        process.stdin.flush()
    said = sorted(process.communicate(timeout=60)[0] for process in processes)
    assert said == ["True\n", "building\nTrue\n"]
    assert (cache.folder.parent / "builds").read_text() == "built\n"
    assert cache.obtain(SETTINGS, never) == PLAN


def test_a_builder_that_is_killed_is_succeeded_by_who_waits(cache, start, caplog):
    builder = start()
    assert builder.stdout.readline() == "building\n"
    (work,) = cache.folder.glob("*.building")
    EngineCache(cache.folder)  # leaves alone what is being built
    assert (work / "step.onnx").exists()
    waiter = start()
    builder.send_signal(signal.SIGKILL)
    assert waiter.stdout.readline() == "building\n"
    assert waiter.communicate("go on\n", timeout=60)[0] == "True\n"
    assert cache.obtain(SETTINGS, never) == PLAN
    assert not work.exists()


@pytest.mark.parametrize(
    ("function", "skip", "left"),
    [
        ("fsync", 0, []),  # while the plan is written
        ("replace", 1, []),  # (the first renames inside of the work folder)
        ("replace", 3, [".plan"]),  # between plan and record
    ],
)
def test_what_a_process_killed_while_writing_leaves_is_no_entry(cache, start, function, skip, left):
    process = start(STOP.format(function=function, skip=skip))
    process.stdin.write("go on\n")
    process.stdin.flush()
    assert [process.stdout.readline() for _ in range(2)] == ["building\n", "stopped\n"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [p.suffix for p in cache.folder.iterdir() if p.suffix in (".plan", ".json")] == left
    assert len(list(cache.folder.glob("*.building"))) == 1
    assert EngineCache(cache.folder).find(SETTINGS) is None
    assert not list(cache.folder.glob("*.building"))  # cleared when the cache was opened
    assert cache.obtain(SETTINGS, lambda work: PLAN) == PLAN
    assert cache.obtain(SETTINGS, never) == PLAN


def test_waiting_is_told(cache, caplog, monkeypatch):
    asked = []

    def flock(file, how):
        asked.append(how)
        if len(asked) == 1:
            raise BlockingIOError

    monkeypatch.setattr(module.fcntl, "flock", flock)
    with caplog.at_level(logging.INFO, module.__name__):
        assert cache.find(SETTINGS) is None
    assert asked == [module.fcntl.LOCK_EX | module.fcntl.LOCK_NB, module.fcntl.LOCK_EX]
    assert "waiting for another process" in caplog.text
