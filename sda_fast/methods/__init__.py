"""The adaptation methods on one footing: images and their identities in, class probabilities out.

To add one, write a file with a class like those here and name it in `METHODS`; it then appears in `sda-fast
evaluate`, the tables and the report. What a method asks for and promises stands in its attributes:

    title       its name in tables
    projection  the projection of the image it uses: "dda", "diffpure" or None
    finetuned   whether it needs the model fine-tuned on aligned synthetic images
    ensemble    whether it combines two predictions and so takes `mode`
    needs       the diffusion models that its constructor takes beside the classifier: "adm", "dit"
    on_request  whether it is left out where no methods are named, as it takes its time
    revision    a number that rises when its results change with this package, 1 at first
    per_image   whether an image's result depends on that image alone, not on the stream it stands in

`tta(images, projected=None, seeds=None)` gives probabilities [N, K] of images [N, 3, H, W] in [-1, 1]; `tta.reset()`
forgets what the stream taught; `tta.cost()` counts network evaluations per image. A method that combines predictions
writes `scores` (dda.py is an example), one that changes weights writes `adapt` (tent.py). Modules are imported
when a method is asked for.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from inspect import signature
from typing import Any

from sda_fast.errors import SdaError
from sda_fast.methods.base import Cost, Method
from sda_fast.values import checked

METHODS = {
    "source": "sda_fast.methods.source:Source",
    "tent": "sda_fast.methods.tent:Tent",
    "memo": "sda_fast.methods.memo:MEMO",
    "diffusion_tta": "sda_fast.methods.diffusion_tta:DiffusionTTA",
    "diffpure": "sda_fast.methods.diffpure:DiffPure",
    "gda": "sda_fast.methods.gda:GDA",
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
    Raises SdaError for an unknown method, or options it does not take or lacks.
    """
    kind = method_class(name)
    try:
        signature(kind).bind(model, **options)
    except TypeError as error:
        raise SdaError(f"method {name}: {error}; it takes {', '.join(signature(kind).parameters)}") from error
    return kind(model, **options)


def create_from(name: str, model: Any, given: Mapping[str, Any], options: Mapping[str, Any]) -> Method:
    """A method with as much of what is given as its class takes, and with options from a file or the command line.

    Raises SdaError as `create` does, and for options of another type.
    """
    parameters = signature(method_class(name)).parameters
    taken = {key: value for key, value in given.items() if key in parameters}
    for key, value in options.items():
        if key in parameters:
            hint = parameters[key].annotation
            if hint is str and type(value) is int:  # the command line's respacing=50 is JSON for a number
                value = str(value)
            value = checked(key, value, hint, f"method {name}")
        taken[key] = value
    return create(name, model, **taken)


def revisions(names: Sequence[str]) -> dict[str, int]:
    """Of the methods whose results have changed with this package."""
    return {name: revision for name in names if (revision := method_class(name).revision) > 1}


__all__ = ["METHODS", "Cost", "Method", "create", "create_from", "method_class", "revisions"]
