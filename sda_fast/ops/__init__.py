"""The operators, each registered in `torch.ops.sda_fast` with its backends behind it (see `_backend`)."""

from sda_fast.ops._backend import BACKENDS, backend
from sda_fast.ops.group_norm_silu import group_norm_silu
from sda_fast.ops.philox_normal import philox_normal

__all__ = ["BACKENDS", "backend", "group_norm_silu", "philox_normal"]
