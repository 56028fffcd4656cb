"""Engines by name."""

from dataclasses import fields
from importlib import import_module
from typing import Any

from sda_fast.engines.base import Engine
from sda_fast.errors import SdaError

# Modules and classes, imported when asked for: ONNX and TensorRT are extras.
ENGINES = {
    "eager": ("eager", "EagerEngine"),
    "inductor": ("inductor", "InductorEngine"),
    "onnx": ("onnx_runtime", "OnnxEngine"),
    "trt": ("tensorrt", "TensorRTEngine"),
}


def create_engine(name: str, **options: Any) -> Engine:
    """The engine of that name, `options` its fields.

    Raises SdaError for an engine that is not known or not installed, and for an option that it does not have.
    """
    if name not in ENGINES:
        raise SdaError(f"engine {name!r} is not known; choose one of {', '.join(ENGINES)}")
    module, cls = ENGINES[name]
    made: Any = getattr(import_module(f"sda_fast.engines.{module}"), cls)
    known = {field.name for field in fields(made)}
    if unknown := [option for option in options if option not in known]:
        raise SdaError(f"engine {name!r} has no option {', '.join(unknown)}: choose another engine or leave it out")
    return made(**options)


def with_winograd(name: str) -> Engine:
    """The engine of that name with its option `winograd`. Raises SdaError where it has none."""
    if name != "inductor":
        raise SdaError(f"winograd is an option of the inductor engine, not of {name}: give both or leave it out")
    return create_engine(name, winograd=True)
