import builtins
import json
from importlib.metadata import PackageNotFoundError

import pytest
import torch

import sda_fast
from sda_fast import doctor


def findings():
    return {finding["part"]: finding for finding in doctor.diagnose()}


def test_every_part_has_a_verdict_and_a_detail():
    found = doctor.diagnose()
    assert json.loads(json.dumps(found)) == found
    for finding in found:
        assert set(finding) == {"part", "works", "detail"}
        assert type(finding["works"]) is bool
        assert finding["part"]
        assert finding["detail"]
    assert len({finding["part"] for finding in found}) == len(found)


def test_what_works_here():
    found = findings()
    assert found["sda-fast"]["works"]
    assert sda_fast.__version__ in found["sda-fast"]["detail"]
    assert found["torch"] == {"part": "torch", "works": True, "detail": torch.__version__}
    assert found["C++ operators"]["works"]
    assert found["photographs testbed"]["works"]
    assert found["NVIDIA GPU"]["works"] == torch.cuda.is_available()


@pytest.mark.parametrize(
    ("part", "distribution", "command"),
    [
        ("Triton kernels", "triton", "pip install triton"),
        ("DALI reader", "nvidia-dali-cuda130", 'pip install "sda-fast[dali]"'),
        ("photographs testbed", "scikit-learn", 'pip install "sda-fast[photos]"'),
        ("photographs testbed", "imagecorruptions-imaug", 'pip install "sda-fast[photos]"'),
    ],
)
def test_what_is_missing_comes_with_the_command(monkeypatch, part, distribution, command):
    find = doctor.version

    def version(name):
        if name == distribution:
            raise PackageNotFoundError(name)
        return find(name)

    monkeypatch.setattr(doctor, "version", version)
    assert findings()[part] == {"part": part, "works": False, "detail": f"{distribution} is not installed: {command}"}


def test_without_the_compiled_module(monkeypatch):
    load = builtins.__import__

    def refuse(name, *arguments):
        if name == "sda_fast._core":
            raise ImportError("no module named _core")
        return load(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refuse)
    found = findings()
    assert not found["C++ operators"]["works"]
    assert "pip install ." in found["C++ operators"]["detail"]
