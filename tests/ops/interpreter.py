"""interpreter.py calls.pt results.pt: calls functions with backend "triton" under Triton's interpreter.

Every access is checked as no device would: it lies in a tensor of the launch, and what a program writes no other
program touches, nor does it read it back, for nothing orders the threads of a program in global memory. The interpreter
runs one program after another, so that their order would hide such faults. What a kernel promises to be a multiple of
something is one.
"""

import importlib
import sys
from pathlib import Path

import numpy as np
import torch
from triton import language as tl
from triton.runtime import interpreter

sys.path.append(str(Path(__file__).parent))  # modules of tests that calls name

NOBODY, SEVERAL = -1, -2


class Memory:
    """The bytes of the tensors of one launch: which program read them and which wrote them."""

    def __init__(self, tensors):
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self.starts = np.array(sorted(start for start, size in storages.items() if size), dtype=np.uint64)
        sizes = np.array([storages[int(start)] for start in self.starts], dtype=np.uint64)
        self.ends = self.starts + sizes
        self.shift = np.concatenate([[0], np.cumsum(sizes)]).astype(np.uint64)[: len(sizes)] - self.starts
        self.readers = np.full(int(sizes.sum()), NOBODY)
        self.writers = np.full(int(sizes.sum()), NOBODY)

    def read(self, program, addresses, size):
        at = self._bytes(program, addresses, size)
        assert (self.writers[at] == NOBODY).all(), f"program {program} reads what a program of its launch writes"
        others = ~np.isin(self.readers[at], (NOBODY, program))
        self.readers[at] = np.where(others, SEVERAL, program)

    def write(self, program, addresses, size, values):
        at = self._bytes(program, addresses, size)
        assert (self.writers[at] == NOBODY).all(), f"program {program} writes what was written in its launch"
        assert np.isin(self.readers[at], (NOBODY, program)).all(), f"program {program} writes what another one reads"
        _, first, inverse = np.unique(addresses, return_index=True, return_inverse=True)
        bits = np.ascontiguousarray(values).view(f"u{values.itemsize}")
        assert (bits == bits[first][inverse.reshape(-1)]).all(), f"program {program} writes two values to one address"
        self.writers[at] = program

    def _bytes(self, program, addresses, size):
        """Where the elements lie in `readers` and `writers`, [N, size]."""
        region = np.searchsorted(self.starts, addresses, side="right") - 1
        inside = (region >= 0) & (addresses + np.uint64(size) <= self.ends[region])
        assert inside.all(), f"program {program} leaves its tensors at {np.flatnonzero(~inside).tolist()[:8]}"
        return (addresses + self.shift[region]).astype(np.int64)[:, None] + np.arange(size)


def check_accesses():
    memory, builder = None, interpreter.InterpreterBuilder
    arguments, load, store = (
        interpreter.GridExecutor._init_args_hst,
        builder.create_masked_load,
        builder.create_masked_store,
    )

    def start(self, args, kwargs):
        nonlocal memory
        args, kwargs = arguments(self, args, kwargs)
        memory = Memory([a for a in [*args, *kwargs.values()] if isinstance(a, torch.Tensor)])
        return args, kwargs

    def program(self):
        x, y, z = self.grid_idx
        return (z * self.grid_dim[1] + y) * self.grid_dim[0] + x

    def element_bytes(pointers):
        return pointers.get_element_ty().primitive_bitwidth // 8

    def checked_load(self, pointers, mask, *rest):
        memory.read(program(self), pointers.data[mask.data], element_bytes(pointers))
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, values, mask, *rest):
        chosen = np.broadcast_to(values.data, pointers.data.shape)[mask.data]
        memory.write(program(self), pointers.data[mask.data], element_bytes(pointers), chosen)
        return store(self, pointers, values, mask, *rest)

    def unknown(*arguments):
        raise NotImplementedError("atomic operations are not checked yet")

    interpreter.GridExecutor._init_args_hst = start
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    builder.create_atomic_rmw = builder.create_atomic_cas = unknown


def check_multiples():
    set_attribute = interpreter.TensorHandle.set_attr

    def checked(self, name, values):
        if name == "tt.divisibility":
            (divisor,) = values
            assert (self.data % self.data.dtype.type(divisor) == 0).all(), f"{self.data} are no multiples of {divisor}"
        set_attribute(self, name, values)

    interpreter.TensorHandle.set_attr = checked


def round_like_a_device():
    """To bfloat16 the interpreter truncates, a device rounds to the nearest."""
    truncating = interpreter._convert_float

    def convert(values, source, target, rounding):
        if (source, target) != (tl.float32, tl.bfloat16):
            return truncating(values, source, target, rounding)
        return torch.from_numpy(values.copy()).bfloat16().view(torch.uint16).numpy()

    interpreter._convert_float = convert


if __name__ == "__main__":
    from sda_fast import ops

    check_accesses()
    check_multiples()
    round_like_a_device()
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN
    results = []
    with ops.backend("triton"):
        for module, function, args, kwargs in torch.load(sys.argv[1]):
            result = getattr(importlib.import_module(module), function)(*args, **kwargs)
            results.append(args[0] if result is None else result)
    torch.save(results, sys.argv[2])
