"""What ptxas reports of a kernel, read."""

import pytest

REPORT = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_80'
ptxas info    : Function properties for first
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 22 registers, used 0 barriers, 2048 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'second' for 'sm_80'
ptxas info    : Function properties for second
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 384 bytes cmem[0]
"""


def test_reading_what_ptxas_reports(compilation):
    first, second = compilation.parse(REPORT)
    assert vars(first) == dict(name="first", registers=22, shared=2048, spills=0, stack=0)
    assert vars(second) == dict(name="second", registers=255, shared=0, spills=12, stack=16)
    both = compilation.greediest([first, second])
    assert vars(both) == dict(name="first, second", registers=255, shared=2048, spills=12, stack=16)
    with pytest.raises(TypeError):
        compilation.parse("Compiling entry function 'x'\n")  # a report without the numbers is no clean bill
