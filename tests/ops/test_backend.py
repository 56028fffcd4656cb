"""Which version of an operator runs: by wish, by device, by the device's compute capability, by size."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sda_fast import _core, doctor, ops
from sda_fast.errors import SdaError
from sda_fast.ops import _backend
from sda_fast.ops.guidance import VERSIONS, _too_large_for

ROOT = Path(__file__).parents[2]
GPU = torch.device("cuda", 0)
BUILT = "80-real 86-real 89-real 90"  # as CMakeLists.txt has it


@pytest.fixture
def gpu(monkeypatch):
    """Lets select() believe in a GPU of this compute capability, Triton, and this build of the CUDA operators."""

    def pretend(capability, architectures=BUILT):
        core = SimpleNamespace(cuda_built=bool(architectures), cuda_architectures=architectures)
        monkeypatch.setattr(_backend, "core", lambda: core)
        monkeypatch.setattr(_backend.importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        _backend._capability.cache_clear()

    yield pretend
    _backend._capability.cache_clear()


def choose(too_large_for=lambda version: ""):
    return _backend.select("guidance", GPU, VERSIONS, too_large_for)


def test_choice_of_backend(monkeypatch):
    def draw():
        return ops.philox_normal((1, 2), seed=0, identities=[0], step=0)

    with pytest.raises(SdaError, match="choose one of plain, cpp, triton, cuda"), ops.backend("numpy"):
        pass
    with pytest.raises(SdaError, match="for NVIDIA GPUs; choose cpp or plain, or let"), ops.backend("cuda"):
        draw()
    with pytest.raises(SdaError, match="TRITON_INTERPRET"), ops.backend("triton"):
        draw()
    with pytest.raises(SdaError, match="has only triton, plain; choose plain, or let"), ops.backend("cpp"):
        ops.modulate(torch.zeros(1, 1, 1), *torch.zeros(2, 1, 1))
    monkeypatch.setenv("SDA_FAST_BACKEND", "gpu")
    with pytest.raises(SdaError, match="SDA_FAST_BACKEND got 'gpu'"):
        draw()
    monkeypatch.setenv("SDA_FAST_BACKEND", "cuda")
    with ops.backend("cpp"):
        draw()
    with pytest.raises(SdaError, match="cannot run as 'cuda' on cpu"):
        draw()


@pytest.mark.parametrize(
    ("capability", "architectures", "chosen"),
    [
        *(((8, minor), BUILT, "cuda") for minor in (0, 6, 7, 9)),
        ((9, 0), BUILT, "cuda"),
        ((10, 0), BUILT, "cuda"),  # by the PTX of 90
        ((12, 1), BUILT, "cuda"),
        ((10, 0), "80-real 90-real", "triton"),
        ((8, 0), "86-real 90", "triton"),  # machine code of a later minor version
        ((8, 9), "80-virtual", "cuda"),
        ((8, 9), "90-virtual", "triton"),
        ((10, 3), "100-real", "cuda"),
        ((9, 0), "native", "cuda"),
        ((9, 0), "", "triton"),
        ((7, 0), BUILT, "plain"),
        ((7, 5), "75", "plain"),
    ],
)
def test_compute_capability(gpu, capability, architectures, chosen):
    gpu(capability, architectures)
    assert choose() == chosen


def test_the_default_build_is_the_one_tested_here():
    assert f"set(CMAKE_CUDA_ARCHITECTURES {BUILT})" in (ROOT / "CMakeLists.txt").read_text()


def test_a_device_without_code_is_named(gpu):
    gpu((10, 0), "80-real 90-real")
    with (
        ops.backend("cuda"),
        pytest.raises(SdaError, match=r"capability is 10.0, .* for 80-real 90-real .* choose triton or plain, or"),
    ):
        choose()
    gpu((7, 5))
    for name in ("cuda", "triton"):
        with ops.backend(name), pytest.raises(SdaError, match=r"capability is 7.5, below 8.0; choose plain, or let"):
            choose()


def test_too_large_an_image_takes_the_next_version(gpu):
    def too_large_for(version):
        return "rows of 2500 pixels are too many" if version == "cuda" else ""

    gpu((9, 0))
    assert choose(too_large_for) == "triton"
    with ops.backend("cuda"), pytest.raises(SdaError, match="2500 pixels are too many; choose triton or plain, or let"):
        choose(too_large_for)


@pytest.mark.parametrize(("factor", "largest"), [(1, 1044), (2, 2088), (4, 2496), (8, 2480), (32, 2400)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_sizes_that_fit_shared_memory(factor, largest, interleaved):
    for size in range(factor, 2 * largest, factor):
        assert _core.guidance_cuda_fits(3, size, size // factor, interleaved) == (size <= largest)


def test_sizes_that_guidance_takes_as_cuda():
    """Of tensors without memory."""
    for size, fits in ((2496, True), (2500, False)):
        x, down = torch.empty(1, 3, size, size, device="meta"), torch.empty(size // 4, size, device="meta")
        reason = _too_large_for("cuda", x, x, down)
        assert reason == ("" if fits else "rows of 2500 pixels, to be reduced to 625, exceed a block's shared memory")
        assert not _too_large_for("triton", x, x, down)


def test_the_doctor_knows_the_capability(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    finding = {"part": "CUDA operators", "works": True, "detail": "compiled"}
    gpu((9, 0))
    assert doctor._on_the_gpu(finding, "cuda", "", gpu=True) == finding
    gpu((7, 0))
    found = doctor._on_the_gpu(finding, "cuda", "", gpu=True)
    assert (found["works"], found["detail"]) == (False, "its compute capability is 7.0, below 8.0")
