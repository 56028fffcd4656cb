"""The Triton kernels, one module per operator, installed as `sda_fast.kernels`.

Importing one of them imports Triton; importing this package does not, unless TRITON_INTERPRET=1 is set.
"""

import importlib.util
import os
from typing import Any


def _let_triton_36_count() -> None:
    """The interpreter of Triton 3.6, that of torch 2.11, takes int() of arrays of one element, as in `range(n)` of a
    kernel. NumPy 2.5 refuses that; Triton 3.7 no longer asks for it."""
    import triton
    from triton.runtime import interpreter

    if not triton.__version__.startswith("3.6."):
        return
    patch = interpreter._patch_lang_tensor

    def patch_and_count(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_count


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    _let_triton_36_count()
