"""The adaptation methods on one footing: images in, class probabilities out.

To add one, write a file with a class like those here and name it in `METHODS`; it then appears in `sda-fast
evaluate`, the tables and the report. What a method may look at is what its class attributes ask for:

    title       its name in tables
    projection  the projection of the image it uses: "dda", "diffpure" or None
    finetuned   whether it needs the model fine-tuned on aligned synthetic images
    ensemble    whether it combines two predictions and so takes `mode`

and `scores(images, projected)` gives probabilities [N, K] from images and their projections, both [N, 3, H, W] in
[-1, 1]. Modules are imported when a method is asked for.
"""

from importlib import import_module
from typing import Any

from sda_fast.errors import SdaError
from sda_fast.methods.base import Method

METHODS = {
    "source": "sda_fast.methods.source:Source",
    "diffpure": "sda_fast.methods.diffpure:DiffPure",
    "dda": "sda_fast.methods.dda:DDA",
    "sda": "sda_fast.methods.sda:SDA",
}


def method_class(name: str) -> type[Method]:
    """The class of a method by name. Raises SdaError for an unknown one."""
    if name not in METHODS:
        raise SdaError(f"method {name!r} is not known; choose from {', '.join(METHODS)}")
    module, attribute = METHODS[name].split(":")
    return getattr(import_module(module), attribute)


def create(name: str, model: Any, **options: Any) -> Method:
    """A method around a classifier: `create("sda", model, finetuned=other, projector=projector)(images)`.

    model: a `Classifier`, or any module from [N, 3, H, W] in [-1, 1] to logits [N, K]. options: those of the class.
    Raises SdaError for an unknown method.
    """
    return method_class(name)(model, **options)


__all__ = ["METHODS", "Method", "create", "method_class"]
