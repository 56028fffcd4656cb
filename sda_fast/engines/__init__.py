"""How a step is executed: eagerly, compiled by Inductor, by ONNX Runtime, or by TensorRT. See docs/engines.md."""

from sda_fast.engines.base import Engine, Program
from sda_fast.engines.create import ENGINES, create_engine
from sda_fast.engines.steps import ClassifierStep, DiTStep, GuidedStep, Precision, Step, UnguidedStep

__all__ = [
    "ENGINES",
    "ClassifierStep",
    "DiTStep",
    "Engine",
    "GuidedStep",
    "Precision",
    "Program",
    "Step",
    "UnguidedStep",
    "create_engine",
]
