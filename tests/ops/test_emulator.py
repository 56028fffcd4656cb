"""The emulator that csrc/cuda runs on where there is no GPU finds the faults it is there for."""

import subprocess

import pytest
from emulator import build

ORDERS = ("ascending", "descending", "shuffled")
RIGHT = "1 2 3 4 5 6 7 0"


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    if not build.compiles():
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("faults")
    source = folder / "faults.cpp"
    source.write_text(build.translated((build.HERE / "faults.cu").read_text(), "faults.cu"))
    build.run(*build.COMPILER, *build.FLAGS, *build.KERNEL_FLAGS, *build.sanitizers(), source, "-o", folder / "faults")

    def run(fault, order="ascending"):
        command = [folder / "faults", fault]
        return subprocess.run(command, env=build.environment(EMULATOR_ORDER=order), capture_output=True, text=True)

    return run


@pytest.mark.parametrize("order", ORDERS)
def test_a_right_kernel(faults, order):
    done = faults("none", order)
    assert (done.returncode, done.stdout.strip()) == (0, RIGHT), done.stderr


@pytest.mark.parametrize("fault", ["no barrier", "unwritten"])
def test_what_is_read_too_early_is_nan(faults, fault):
    assert any("nan" in faults(fault, order).stdout for order in ORDERS)


SANITIZED = pytest.mark.skipif(not build.address_sanitizer(), reason="not GCC with its address sanitizer")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("two barriers", "threads wait at different barriers"),
        ("left early", "some threads ended while others wait"),
        pytest.param("beyond shared", "heap-buffer-overflow", marks=SANITIZED),
        pytest.param("beyond global", "heap-buffer-overflow", marks=SANITIZED),
        pytest.param("unaligned", "misaligned address", marks=SANITIZED),
    ],
)
def test_what_ends_a_kernel(faults, fault, reason):
    done = faults(fault)
    assert done.returncode != 0
    assert reason in done.stderr


def test_more_shared_memory_than_a_block_may_take_unasked(faults):
    assert faults("too much").stdout.strip() == "not launched"
