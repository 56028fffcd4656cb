"""Image classifiers: any timm model, behind the package's own range of values."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from sda_fast.errors import SdaError


class Classifier(nn.Module):
    """A timm model that takes images in [-1, 1] and knows its classes.

    `classes` are the names of its outputs in order. `input_size` is the side it sees; where `resize` is not None,
    evaluation first scales a picture's short side to `resize` (Pillow bicubic) and cuts the centre.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, classes: Sequence[str], input_size: int, resize: int | None, config: dict):
        super().__init__()
        self.model = model
        self.classes = tuple(classes)
        self.input_size, self.resize = input_size, resize
        self.config = config
        cfg: Any = model.pretrained_cfg
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(cfg[name]).reshape(1, 3, 1, 1), persistent=False)

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
) -> Classifier:
    """A timm model by name, `options` handed to timm, with one output for each of `classes`.

    Raises SdaError for a name timm does not know or options its model does not take.
    """
    import timm

    options = dict(options or {})
    config = {
        "architecture": architecture,
        "options": options,
        "classes": list(classes),
        "input_size": input_size,
        "resize": resize,
    }
    if not timm.is_model(architecture):
        close = get_close_matches(architecture, timm.list_models(), 5)
        raise SdaError(f"timm has no model named {architecture!r}; close names: {', '.join(close) or 'none'}")
    try:
        model = timm.create_model(architecture, pretrained=pretrained, num_classes=len(classes), **options)
    except TypeError as error:
        raise SdaError(f"timm's {architecture} does not take these options: {error}") from error
    return Classifier(model, classes, input_size, resize, config)
