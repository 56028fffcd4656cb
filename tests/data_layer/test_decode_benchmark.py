"""The loader benchmark runs, and its rows say what was compared."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "decode.py"


def test_rows(tmp_path):
    pytest.importorskip("nvidia.dali", reason='needs pip install "sda-fast[dali]"')
    command = [sys.executable, SCRIPT, "--images", 6, "--repeats", 1, "--output", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    pillow, dali = map(json.loads, (tmp_path / "decode.jsonl").read_text().splitlines())
    assert (pillow["decoder"], pillow["speedup"], dali["decoder"]) == ("pillow", 1, "dali")
    assert 0 < dali["largest_difference"] <= 2
    assert dali["mean_difference"] <= 0.02
    assert dali["speedup"] == pytest.approx(dali["images_per_second"] / pillow["images_per_second"], rel=0.01)
    assert dali.items() >= {"images": 6, "reading_threads": 2}.items()


def test_without_dali_pillow_alone_is_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import decode

    monkeypatch.setattr(sys, "argv", ["", "--images=2", "--repeats=1", f"--output={tmp_path}"])
    with pytest.raises(SystemExit) as end:
        decode.main()
    assert end.value.code == 0
    (row,) = map(json.loads, (tmp_path / "decode.jsonl").read_text().splitlines())
    assert (row["decoder"], row["speedup"]) == ("pillow", 1)
    skipped, timed = capsys.readouterr().out.splitlines()
    assert skipped.startswith("SKIPPED: dali: ")
    assert skipped.endswith('pip install "sda-fast[dali]"')
    assert timed.startswith("pillow ")


def test_crops_beyond_the_bound_have_no_figure(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import decode

    times = {"pillow": [2.0], "dali": [1.0]}
    assert decode.result("dali", 10, times, (2, 0.01)) == {
        "largest_difference": 2,
        "mean_difference": 0.01,
        "images_per_second": 10.0,
        "speedup": 2.0,
    }
    for difference in ((3, 0.01), (2, 0.03)):
        row = decode.result("dali", 10, times, difference)
        assert row.keys() == {"largest_difference", "mean_difference"}
        assert "PARITY FAILED" in decode.line({"decoder": "dali", **row})
