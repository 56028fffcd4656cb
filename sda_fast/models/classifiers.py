"""Image classifiers: any timm model, behind the package's own range of values."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sda_fast.errors import SdaError


class Classifier(nn.Module):
    """A timm model that takes images in [-1, 1] and knows its classes.

    `classes` are the names of its outputs in order. `input_size` is the side it sees; where `resize` is not None,
    evaluation first scales a picture's short side to `resize` (Pillow bicubic) and cuts the centre. `mean` and `std` of
    the three channels, in [0, 1], normalise what the model sees.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, classes: Sequence[str], input_size: int, resize: int | None, config: dict):
        """config: what `create_classifier` takes to build it again; its "mean" and "std" are used."""
        super().__init__()
        self.model = model
        self.classes = tuple(classes)
        self.input_size, self.resize = input_size, resize
        self.config = config
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(config[name]).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x float [N, 3, H, W] in [-1, 1] -> logits [N, classes].

        Images larger than `input_size` are cut to their centre. Raises SdaError for smaller ones.
        """
        size = self.input_size
        height, width = x.shape[-2:]
        if min(height, width) < size:
            raise SdaError(f"images of {width}x{height} are smaller than the classifier's {size}x{size}: resize them")
        if (height, width) != (size, size):
            top, left = round((height - size) / 2), round((width - size) / 2)
            x = x[..., top : top + size, left : left + size]
        return self.model(((x + 1) / 2 - self.mean) / self.std)


def create_classifier(
    architecture: str,
    classes: Sequence[str],
    options: Mapping[str, Any] | None = None,
    input_size: int = 224,
    resize: int | None = None,
    pretrained: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Classifier:
    """A timm model by name, `options` handed to timm, with one output for each of `classes`.

    mean, std: see `Classifier`; by default those of the weights that timm has under this name.
    Raises SdaError for a name timm does not know, options its model does not take, and a mean or std out of range.
    """
    import timm

    options = dict(options or {})
    config: dict[str, Any] = {
        "architecture": architecture,
        "options": options,
        "classes": list(classes),
        "input_size": input_size,
        "resize": resize,
    }
    _require_known(architecture)
    try:
        model = timm.create_model(architecture, pretrained=pretrained, num_classes=len(classes), **options)
    except TypeError as error:
        raise SdaError(f"timm's {architecture} does not take these options: {error}") from error
    config |= _normalisation(model, mean, std)
    return Classifier(model, classes, input_size, resize, config)


def _normalisation(
    model: Any, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> dict[str, list[float]]:
    """What is given, or else what timm knows, as it stands in a classifier's config."""
    cfg = model.pretrained_cfg
    mean, std = [float(x) for x in mean or cfg["mean"]], [float(x) for x in std or cfg["std"]]
    if len(mean) != 3 or not all(0 <= x <= 1 for x in mean):
        raise SdaError(f"mean {mean} is out of range: give one number in [0, 1] for each of the three channels")
    if len(std) != 3 or not all(0 < x <= 1 for x in std):
        raise SdaError(f"std {std} is out of range: give one number above 0, up to 1, for each of the three channels")
    return {"mean": mean, "std": std}


def with_drop_path(classifier: Classifier, rate: float) -> Classifier:
    """The same weights with stochastic depth: in training, residual branches are dropped, the last at `rate`.

    The result is frozen and in eval mode if it is not told otherwise, as from `load_classifier`.
    Raises SdaError for an architecture that does not take timm's `drop_path_rate`.
    """
    config = {**classifier.config, "options": {**classifier.config["options"], "drop_path_rate": rate}}
    result = create_classifier(**config)
    result.load_state_dict(classifier.state_dict())
    return result.eval().requires_grad_(False)


def _require_known(architecture: str) -> None:
    import timm

    if not timm.is_model(architecture):
        close = get_close_matches(architecture, timm.list_models(), 5)
        raise SdaError(f"timm has no model named {architecture!r}; close names: {', '.join(close) or 'none'}")


def classes_of(outputs: int, classes: Sequence[str] | None, source: str | Path) -> list[str]:
    """The names of a classifier's outputs: those given, or ImageNet's WordNet identities for a thousand.

    Raises SdaError, naming the `source` of the weights, if their number is another.
    """
    if classes is None and outputs == 1000:
        from timm.data.imagenet_info import ImageNetInfo

        return list(ImageNetInfo().label_names())
    if classes is None or len(classes) != outputs:
        given = "ImageNet has 1000" if classes is None else f"{len(classes)} are given"
        raise SdaError(f"{source} tells {outputs} classes apart, {given}: give the names of its classes in order")
    return list(classes)


def pretrained_classifier(name: str, classes: Sequence[str] | None = None) -> Classifier:
    """A timm model, with or without tag ("resnet50.tv_in1k"), with the weights timm publishes; fetched if need be.

    Images are shown to it as its own evaluation does, the short side scaled by Pillow's bicubic. Raises SdaError for
    an unknown name, or if there are no weights or they cannot be fetched.
    """
    import timm

    architecture, _, _ = name.partition(".")
    _require_known(architecture)
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # whatever the Hub's client, a socket or timm raise
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise SdaError(
            f"timm's weights of {name} cannot be had ({reason}): connect to the network, or give a file"
        ) from error
    cfg: Any = model.pretrained_cfg
    size, resize = cfg["input_size"][-1], int(cfg["input_size"][-1] / cfg["crop_pct"])
    names = classes_of(cfg["num_classes"], classes, f"timm's {name}")
    config = {"architecture": name, "options": {}, "classes": names, "input_size": size, "resize": resize}
    config |= _normalisation(model)
    return Classifier(model, names, size, resize, config)
