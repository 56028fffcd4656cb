"""run.py _core.so calls.pt results.pt: calls functions with backend "cuda" on the CPU, in every order of threads."""

import copy
import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.append(str(Path(__file__).parents[1]))  # modules of tests that calls name

import sda_fast

ORDERS = ("ascending", "descending", "shuffled")


def replace_core(path):
    spec = importlib.util.spec_from_file_location("sda_fast._core", path)
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    sys.modules["sda_fast._core"] = sda_fast._core = core


def call(module, function, args, kwargs):
    """What the function returns, or the first argument it has written, the same bits in every order."""
    results = []
    for order in ORDERS:
        os.environ["EMULATOR_ORDER"] = order
        given, named = copy.deepcopy((args, kwargs))
        result = getattr(importlib.import_module(module), function)(*given, **named)
        results.append(given[0] if result is None else result)
        different = f"{function}: not the bits of {ORDERS[0]} in order {order}"
        torch.testing.assert_close(results[-1], results[0], rtol=0, atol=0, equal_nan=True, msg=different)
    return results[0]


if __name__ == "__main__":
    path, calls, target = sys.argv[1:]
    replace_core(path)
    from sda_fast import ops
    from sda_fast.ops import _backend

    _backend.obstacle = lambda name, device: "" if name == "cuda" else "only the CUDA version is here"
    torch.cuda.current_stream = lambda: SimpleNamespace(cuda_stream=0)
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN
    with ops.backend("cuda"):
        torch.save([call(*each) for each in torch.load(calls)], target)
