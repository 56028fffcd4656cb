import json
import os
import re
import subprocess
import sys

import pytest

from sda_fast.errors import SdaError
from sda_fast.files import machine_id, temporary_name, write_bytes, write_json


def test_writing_makes_folders_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "deep" / "er" / ("n" * 255)  # as long as a name may be
    assert write_bytes(b"one", path) == path
    assert write_bytes(b"two", str(path)) == path
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == [path.name]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = write_bytes(b"old", tmp_path / "a.txt")
    for failure, raised in (
        (OSError(28, "No space left on device"), SdaError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):

        def fail(_, error=failure):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(raised) as caught:
                write_bytes(b"new", path)
        assert raised is KeyboardInterrupt or "a.txt cannot be written (No space left" in str(caught.value)
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["a.txt"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SdaError, match=r"file/a\.txt cannot be written"):
        write_bytes(b"", tmp_path / "file" / "a.txt")
    with pytest.raises(SdaError, match="cannot be written"):
        write_bytes(b"", tmp_path)


def test_a_reader_never_sees_half_a_file(tmp_path):
    """Another process writes two contents in turn; every reading gets one of the two."""
    code = (
        "import sys\nfrom sda_fast.files import write_bytes\n"
        "for i in range(200): write_bytes((b'a', b'b')[i % 2] * 100_000, sys.argv[1])\n"
    )
    path = tmp_path / "a"
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
    readings = 0
    while writer.poll() is None:
        if path.exists():
            assert path.read_bytes() in (b"a" * 100_000, b"b" * 100_000)
            readings += 1
    assert writer.returncode == 0
    assert readings > 0


def test_json_reads_back_and_ends_in_a_newline(tmp_path):
    value = {"name": os.fsdecode(b"sch\xc3\xb6n \xff"), "sizes": [32, 6.0], "on": True, "model": None}
    text = write_json(value, tmp_path / "a.json").read_text(encoding="ascii")
    assert json.loads(text) == value
    assert text.startswith('{\n  "name"')
    assert text.endswith("}\n")
    with pytest.raises(TypeError):
        write_json({"x": object()}, tmp_path / "b.json")
    assert os.listdir(tmp_path) == ["a.json"]


def test_temporary_names_are_hidden_and_never_the_same():
    names = [temporary_name() for _ in range(100)]
    assert len(set(names)) == 100
    assert all(re.fullmatch(rf"\.sda-{machine_id()}-{os.getpid()}-\d+\.tmp", name) for name in names)


def test_machine_id_is_the_same_in_another_process():
    code = "import sys; from sda_fast.files import machine_id; print(machine_id(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [machine_id(), "False"]
    assert re.fullmatch("[0-9a-f]{8}", machine_id())
