import builtins
import importlib.util
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
    photos = all(importlib.util.find_spec(name) for name in ("skimage", "sklearn", "imagecorruptions"))
    assert found["photographs testbed"]["works"] == photos
    assert found["NVIDIA GPU"]["works"] == torch.cuda.is_available()


@pytest.mark.parametrize(
    ("part", "distribution", "command"),
    [
        ("Triton operators", "triton", "pip install triton"),
        ("engine onnx", "onnxruntime", 'pip install "sda-fast[onnx]"'),
        ("decoder DALI (CPU)", "nvidia-dali-cuda130", 'pip install "sda-fast[dali]"'),
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


def test_engines_and_decoders_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = findings()
    assert found["engine eager"]["works"]
    assert found["decoder Pillow"]["works"]
    for part in ("NVIDIA GPU", "CUDA operators", "Triton operators", "engine trt", "decoder DALI (GPU)"):
        assert not found[part]["works"], part
    for part in ("engine trt", "decoder DALI (GPU)"):
        assert found[part]["detail"] == "no NVIDIA GPU was found"


@pytest.mark.parametrize("there", [True, False])
def test_inductor_needs_a_compiler(monkeypatch, tmp_path, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    compiler = tmp_path / "c++"
    if there:
        compiler.touch(mode=0o755)
    monkeypatch.setenv("CXX", str(compiler))
    finding = findings()["engine inductor"]
    assert finding["works"] == there
    if not there:
        assert finding["detail"] == f"the C++ compiler {compiler} was not found: apt-get install g++ (or set CXX)"


@pytest.fixture
def only_eager(monkeypatch):
    """The other engines take half a minute to try."""
    engines = [{"part": f"engine {name}", "works": name == "eager", "detail": "found"} for name in ("eager", "trt")]
    monkeypatch.setattr(doctor, "_engines", lambda gpu: engines)


def test_try_runs_what_could_work(only_eager):
    found = {finding["part"]: finding for finding in doctor.diagnose(attempt=True)}
    assert found["engine eager"]["works"]
    assert found["engine eager"]["detail"].startswith("found; a tiny step is right (prepared in ")
    assert found["engine trt"] == {"part": "engine trt", "works": False, "detail": "found"}


@pytest.mark.parametrize("how", ["raises", "is wrong"])
def test_try_says_what_goes_wrong(only_eager, monkeypatch, how):
    from sda_fast.engines import eager

    def run(self, *inputs):
        if how == "raises":
            raise RuntimeError("\nno kernel image\nand more")
        return tuple(torch.zeros_like(y) for y in self._step(*inputs))

    monkeypatch.setattr(eager.EagerProgram, "run", run)
    found = {finding["part"]: finding for finding in doctor.diagnose(attempt=True)}
    assert not found["engine eager"]["works"]
    expected = "found; no kernel image" if how == "raises" else "found; the step differs from float32 in out by"
    assert found["engine eager"]["detail"].startswith(expected)
