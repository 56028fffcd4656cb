import json
import os
import pickle
import re
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from sda_fast.data import read_image, write_png
from sda_fast.errors import SdaError
from sda_fast.files import machine_id, temporary_name
from sda_fast.stages.align import AlignSettings
from sda_fast.stages.corrupt import CorruptSettings
from sda_fast.stages.manifest import BEFORE, check_output, file_sha256, open_output, state_sha256
from sda_fast.stages.synthesize import SynthesizeSettings

SETTINGS = {
    "seed": 0,
    "scale": 6.0,
    "size": (32, 32),
    "model": {"sha256": "ab", "precision": "fp32"},
    "on": True,
}
ARRAY = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def test_a_new_folder_gets_a_manifest(tmp_path):
    output = open_output(tmp_path / "a" / "b", "align", SETTINGS)
    assert not output.resumed
    assert os.listdir(output.folder) == ["manifest.json"]
    written = manifest(output.folder)
    assert set(written) == {"format", "stage", "settings", "version", "created"}
    assert written["stage"] == "align"
    assert written["settings"] == output.settings
    assert output.settings["size"] == [32, 32]
    assert pickle.loads(pickle.dumps(output)) == output  # workers are sent it


def test_the_same_settings_resume_and_keep_the_manifest(tmp_path):
    before = open_output(tmp_path, "align", SETTINGS | {"input": Path("x/y")})
    write_png(ARRAY, before.path("n/1"))
    text = (tmp_path / "manifest.json").read_bytes()
    reordered = dict(reversed(SETTINGS.items())) | {"scale": 6, "size": [32, 32], "input": "x/y"}
    output = open_output(tmp_path, "align", reordered)
    assert output.resumed
    assert output.done("n/1")
    assert not output.done("n/2")
    assert (tmp_path / "manifest.json").read_bytes() == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed = 0, this run has seed = 1"),
        ({"on": 1}, "on = true, this run has on = 1"),
        (
            {"model": {"sha256": "ab", "precision": "bf16"}},
            r'precision = "fp32", this run has model.precision = "bf16"',
        ),
        ({"model": None}, "this run has model = null"),
        ({"size": [32, 33]}, r"size = \[32, 32\], this run has size = \[32, 33\]"),
        ({"new": 3}, r"new = \(absent\), this run has new = 3"),
        ({"scale": 5, "new": 3}, "scale = 6.0, this run has scale = 5"),
    ],
)
def test_other_settings_are_refused_with_both_values(tmp_path, change, message):
    open_output(tmp_path, "align", SETTINGS)
    with pytest.raises(SdaError, match=rf"^--output .*{message}: use another --output or delete the folder\.$"):
        open_output(tmp_path, "align", SETTINGS | change)


EARLIER = {"seed": 0, "respacing": "10", "weights": {"adm": "ab"}}  # before there was any setting of BEFORE


def made_of(settings: dict) -> dict:
    """A stage's settings with those of its inputs in every form they have, and in those of an input once more."""
    inner = {**settings, "input_made_with": settings}
    kinds = {"dda": inner, "diffpure": None}
    return {**settings, "input_made_with": inner, "projection_made_with": inner, "projections_made_with": kinds}


@pytest.mark.parametrize("form", [dict, made_of])
def test_a_folder_from_before_a_setting_existed_goes_on(tmp_path, form):
    """As what runs did then; its manifest stays as it was."""
    open_output(tmp_path / "earlier", "align", form(EARLIER))
    text = (tmp_path / "earlier" / "manifest.json").read_bytes()
    assert open_output(tmp_path / "earlier", "align", form(EARLIER | BEFORE)).resumed
    assert check_output(tmp_path / "earlier", "align", lambda: form(EARLIER | BEFORE)).resumed
    assert (tmp_path / "earlier" / "manifest.json").read_bytes() == text
    open_output(tmp_path / "now", "align", form(EARLIER | BEFORE))  # over an input that an earlier version made
    assert open_output(tmp_path / "now", "align", form(EARLIER)).resumed


@pytest.mark.parametrize("where", ["", "input_made_with.", "projection_made_with.", "projections_made_with.dda."])
@pytest.mark.parametrize(
    ("name", "change", "old", "new"),
    [
        ("format", {"format": "original"}, '"png"', '"original"'),
        ("phase_convolutions", {"phase_convolutions": True}, "false", "true"),
        ("jacobian_free", {"jacobian_free": True}, "false", "true"),
        ("engine", {"precision": "bf16", "engine": "inductor"}, '"eager"', '"inductor"'),
        ("seed", {"seed": 1}, "0", "1"),
        ("factor", {"factor": 4}, "(absent)", "4"),
        ("options", {"options": {"format": "png"}}, "(absent)", '{"format": "png"}'),
        ("weights.engine", {"weights": {"adm": "ab", "engine": "eager"}}, "(absent)", '"eager"'),
    ],
)
def test_a_folder_from_before_a_setting_existed_goes_on_as_nothing_else(tmp_path, where, name, change, old, new):
    def settings(innermost):
        for key in reversed(where.split(".")[:-1]):
            innermost = {key: innermost}
        return innermost

    open_output(tmp_path, "align", settings(EARLIER))
    with pytest.raises(SdaError, match=re.escape(f"with {where}{name} = {old}, this run has {where}{name} = {new}:")):
        open_output(tmp_path, "align", settings(EARLIER | BEFORE | change))


FROM_THE_FIRST = {
    AlignSettings: "projection respacing start factor scale norm norm_group engine precision batch_size seed",
    SynthesizeSettings: "respacing cfg_scale clip batch_size seed",
    CorruptSettings: "size resize jpeg_quality seed font",
}


@pytest.mark.parametrize("kind", FROM_THE_FIRST)
def test_every_setting_was_there_from_the_first_or_has_its_line(kind):
    """Without one, nobody could go on with what an earlier version began."""
    assert {field.name for field in fields(kind)} <= {*FROM_THE_FIRST[kind].split(), *BEFORE}


def test_a_setting_that_went_away_and_another_stage_are_refused(tmp_path):
    open_output(tmp_path, "align", SETTINGS)
    with pytest.raises(SdaError, match=r"seed = 0, this run has seed = \(absent\)"):
        open_output(tmp_path, "align", {k: v for k, v in SETTINGS.items() if k != "seed"})
    with pytest.raises(SdaError, match=r"results of 'align', not of 'synthesize': use another --to"):
        open_output(tmp_path, "synthesize", SETTINGS, option="--to")
    with pytest.raises(SdaError, match="holds results already"):
        open_output(tmp_path, "align", SETTINGS, resume=False)


def test_what_a_process_left_behind_is_removed_even_if_nobody_waits_for_it(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    while "Z" not in Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2]:
        time.sleep(0.001)
    mine = tmp_path / temporary_name()
    mine.touch()
    (tmp_path / f".sda-{machine_id()}-{process.pid}-0.tmp").touch()
    open_output(tmp_path, "align", SETTINGS)
    assert list(tmp_path.glob(".sda-*")) == [mine]
    process.wait()


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / ".hidden").write_bytes(b"")
    (tmp_path / "holiday.png").write_bytes(b"")
    with pytest.raises(SdaError, match=r"holds holiday\.png but no manifest\.json"):
        open_output(tmp_path, "align", SETTINGS)
    (tmp_path / "holiday.png").unlink()
    open_output(tmp_path, "align", SETTINGS)  # a hidden file does no harm


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 99, "stage": "align", "settings": {}}'])
def test_a_damaged_or_foreign_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(SdaError, match=r"manifest\.json (cannot be read|was not written)"):
        open_output(tmp_path, "align", SETTINGS)


def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    for place in ("file", "file/below"):
        with pytest.raises(SdaError, match=rf"--output .*{place} cannot be used"):
            open_output(tmp_path / place, "align", SETTINGS)
    open_output(tmp_path / "out", "align", SETTINGS)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(SdaError, match="out is not writable"):
        open_output(tmp_path / "out", "align", SETTINGS)


def test_only_whole_files_are_done(tmp_path):
    output = open_output(tmp_path, "align", SETTINGS)
    path = output.path("two.dots/a.b")
    assert path == tmp_path / "two.dots" / "a.b.png"
    assert not output.done("two.dots/a.b")
    write_png(ARRAY, path)
    assert output.done("two.dots/a.b")
    whole = path.read_bytes()
    for content in (b"", whole[:-1], whole[1:], whole[:8], b"IEND"):
        path.write_bytes(content)
        assert not output.done("two.dots/a.b")
    (tmp_path / "folder.png").mkdir()
    assert not output.done("folder")


@pytest.mark.parametrize("key", ["", "/etc/a", "../a", "a/../../b"])
def test_keys_stay_inside_the_folder(tmp_path, key):
    with pytest.raises(SdaError, match="no place inside"):
        open_output(tmp_path, "align", SETTINGS).path(key)


def test_finishing_adds_a_summary_and_leaves_the_rest(tmp_path):
    output = open_output(tmp_path, "align", SETTINGS)
    before = manifest(tmp_path)
    output.finish({"images": 3, "skipped": 1})
    output.finish({"images": 4})
    after = manifest(tmp_path)
    assert after.pop("finished").items() >= {"images": 4}.items()
    assert after == before
    assert open_output(tmp_path, "align", SETTINGS).resumed
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_temporary_files_of_the_dead_are_removed_and_others_kept(tmp_path):
    output = open_output(tmp_path, "align", SETTINGS)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    folder = tmp_path / "n"
    folder.mkdir()
    dead = folder / f".sda-{machine_id()}-{gone.pid}-7.tmp"
    elsewhere, forgotten = folder / f".sda-00000000-{gone.pid}-7.tmp", folder / ".sda-00000000-1-8.tmp"
    alive, unrelated = folder / temporary_name(), folder / ".other.tmp"
    for file in (dead, elsewhere, forgotten, alive, unrelated):
        file.write_bytes(b"half")
    os.utime(forgotten, (0, 0))
    assert open_output(tmp_path, "align", SETTINGS) is not output
    assert set(folder.iterdir()) == {elsewhere, alive, unrelated}


def run(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


OPEN = """
import sys, time
from sda_fast.errors import SdaError
from sda_fast.stages.manifest import open_output
folder, seed = sys.argv[1], int(sys.argv[2])
print("ready", flush=True)
start = float(sys.stdin.readline())
for i in range(20):
    time.sleep(max(0, start + i / 20 - time.time()))
    try:
        print(open_output(f"{folder}/{i}", "align", {"seed": seed}).settings["seed"])
    except SdaError as error:
        print("refused" if "was made with seed" in str(error) else error)
"""


def test_processes_that_open_at_once_agree(tmp_path):
    """Twenty new folders, each opened at once by three processes, one of which has another seed."""
    workers = [run(OPEN, tmp_path, seed) for seed in (0, 0, 1)]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    start = f"{time.time() + 0.5}\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(start)
        worker.stdin.flush()
    said = [worker.communicate(timeout=120) for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), said
    lines = [out.split("\n")[:20] for out, _ in said]
    for i in range(20):
        winner = manifest(tmp_path / str(i))["settings"]["seed"]
        assert [line[i] for line in lines] == [("refused", str(seed))[seed == winner] for seed in (0, 0, 1)]
        assert os.listdir(tmp_path / str(i)) == ["manifest.json"]


WRITE = """
import sys, numpy as np
from sda_fast.data import write_png
from sda_fast.stages.manifest import open_output
output = open_output(sys.argv[1], "align", {"seed": 0})
print("ready", flush=True)
for i in range(10**6):
    write_png(np.full((96, 96, 3), i % 256, np.uint8), output.path(f"{i % 7}/{i}"))
"""


def test_a_killed_writer_leaves_nothing_half_done(tmp_path):
    """Killed without warning: all that is there is whole, and opening again removes the rest."""
    worker = run(WRITE, tmp_path)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n"
    while not (tmp_path / "6").exists():
        assert worker.poll() is None
    worker.kill()
    worker.communicate()
    output = open_output(tmp_path, "align", {"seed": 0})
    files = [file for file in tmp_path.rglob("*") if file.is_file() and file.name != "manifest.json"]
    assert len(files) >= 6
    for file in files:
        key = file.relative_to(tmp_path).as_posix().removesuffix(".png")
        assert output.done(key)
        assert np.ptp(read_image(file)) == 0


def test_a_file_system_without_links_works_too(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", unsupported)
    assert not open_output(tmp_path, "align", SETTINGS).resumed
    assert open_output(tmp_path, "align", SETTINGS).resumed
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_hash_of_a_file(tmp_path):
    (tmp_path / "w").write_bytes(b"abc")
    assert file_sha256(tmp_path / "w") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(SdaError, match="none cannot be read"):
        file_sha256(tmp_path / "none")


def test_hash_of_weights_sees_names_dtypes_shapes_and_values_only():
    x = torch.arange(6, dtype=torch.float32)
    state = {
        "b": x.reshape(2, 3),
        "a": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "h": x.bfloat16(),
        "m": x > 2,
    }
    same = state_sha256(state)
    assert same == state_sha256(dict(reversed(state.items())))
    assert same == state_sha256(state | {"b": x.reshape(2, 3).t().contiguous().t()})
    for change in (
        {"b": x.reshape(3, 2)},
        {"b": x.reshape(2, 3).double()},
        {"b": x.reshape(2, 3).nextafter(torch.tensor(9.0))},
        {"a": torch.tensor([3])},
        {"empty": torch.zeros(4, 0)},
        {"h": x.half()},
        {"new": x},
    ):
        assert state_sha256(state | change) != same
    model = torch.nn.BatchNorm2d(3)
    assert state_sha256(model) == state_sha256(model.state_dict()) != same
