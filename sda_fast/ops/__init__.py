"""The operators, each registered in `torch.ops.sda_fast` with its backends behind it (see `_backend`)."""

from sda_fast.ops._backend import BACKENDS, backend
from sda_fast.ops.guidance import guidance
from sda_fast.ops.philox_normal import philox_normal

__all__ = ["BACKENDS", "backend", "guidance", "philox_normal"]
