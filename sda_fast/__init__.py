"""Synthetic-Domain Alignment for test-time adaptation: synthesise, align, fine-tune, project, combine.

The public names are loaded on first use, so that `import sda_fast` imports neither torch nor CUDA.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sda_fast.methods.ensembles import combine_scores
    from sda_fast.projector import Projector

__all__ = ["Projector", "__version__", "combine_scores"]

__version__ = metadata.version("sda-fast")

_HOMES = {"Projector": "sda_fast.projector", "combine_scores": "sda_fast.methods.ensembles"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
