"""The operators, each registered in `torch.ops.sda_fast` with its backends behind it (see `_backend`)."""

from sda_fast.ops._backend import BACKENDS, backend
from sda_fast.ops.group_norm_silu import group_norm_silu
from sda_fast.ops.guidance import guidance
from sda_fast.ops.modulate import gate_residual, modulate
from sda_fast.ops.philox_normal import philox_normal
from sda_fast.ops.reverse_step import reverse_step
from sda_fast.ops.to_uint8 import to_uint8
from sda_fast.ops.winograd_convolution import winograd_convolution

__all__ = [
    "BACKENDS",
    "backend",
    "gate_residual",
    "group_norm_silu",
    "guidance",
    "modulate",
    "philox_normal",
    "reverse_step",
    "to_uint8",
    "winograd_convolution",
]
