"""Grad-CAM (Selvaraju et al. 2017): which parts of an image weigh most in a classifier's prediction.

The method is the package grad-cam's; what is chosen here is the layer it looks at.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sda_fast.errors import SdaError

if TYPE_CHECKING:  # torch is slow to import, and tables need none of it
    from torch import Tensor, nn

    from sda_fast.models import Classifier

SMALLEST_MAP = 4  # positions a side; on fewer nothing can be told apart


class Activation(NamedTuple):
    """heat: float32 [N, H, W] in [0, 1], of the images' size; predicted: the class index of each; layer: its name."""

    heat: NDArray[np.float32]
    predicted: list[int]
    layer: str


def class_activation(classifier: "Classifier", images: "Tensor") -> Activation:
    """Grad-CAM of each image's predicted class. images: float [N, 3, S, S] in [-1, 1], S the classifier's input size.

    Layer: the last stage of a ResNet, Swin or ConvNeXt of timm whose map has at least 4x4 positions: for images of 224
    pixels their last one (7x7, the one that is pooled), as in the paper's Figure 4; for patches of 32 an earlier one,
    as the last has a single position. Each image's heat is scaled to reach from 0 to 1. Raises SdaError without the
    package grad-cam, for another family, or if no stage has so many positions.
    """
    GradCAM = _grad_cam()
    name, layer = _layer(classifier, images[:1])
    images = images.detach().clone().requires_grad_(True)  # gradients must flow although the weights are frozen
    with GradCAM(classifier, [layer], _channels_first if _is_swin(classifier.model) else None) as cam:
        heat = cam(images, targets=None)
        predicted = cam.outputs.argmax(dim=1).tolist()
    return Activation(np.asarray(heat, np.float32), predicted, name)


def stages(model: "nn.Module") -> list[tuple[str, "nn.Module"]]:
    """(name, module) of the stages of a timm ResNet (ResNeXt too), Swin (V2 too) or ConvNeXt (V2 too), first to last.

    Of a Swin's last stage it is the normalisation behind it, whose output is what is pooled. Raises SdaError for
    another family.
    """
    from timm.models import ConvNeXt, ResNet

    if isinstance(model, ResNet):
        names = [f"layer{i}" for i in range(1, 5) if hasattr(model, f"layer{i}")]
    elif isinstance(model, ConvNeXt):
        names = [f"stages.{name}" for name, _ in model.get_submodule("stages").named_children()]
    elif _is_swin(model):
        layers = [f"layers.{name}" for name, _ in model.get_submodule("layers").named_children()]
        names = [*layers[:-1], "norm"]
    else:
        raise SdaError(
            f"Grad-CAM has no rule for the layer of a {type(model).__name__}: use a ResNet, Swin or ConvNeXt of timm"
        )
    return [(name, model.get_submodule(name)) for name in names]


def overlay(image: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The image [H, W, 3] under a half-transparent map of heat [H, W] in [0, 1], from blue over green to red."""
    _grad_cam()
    from pytorch_grad_cam.utils.image import show_cam_on_image

    return show_cam_on_image(np.float32(image) / 255, np.clip(heat, 0, 1), use_rgb=True)


def _layer(classifier: "Classifier", image: "Tensor") -> tuple[str, "nn.Module"]:
    """The last stage with enough positions; a forward pass tells how many each has."""
    import torch

    found = stages(classifier.model)
    sides: dict[nn.Module, int] = {}

    def note(module: "nn.Module", inputs: Any, output: "Tensor") -> None:
        maps = _channels_first(output) if _is_swin(classifier.model) else output
        sides[module] = min(maps.shape[2:])

    handles = [module.register_forward_hook(note) for _, module in found]
    try:
        with torch.no_grad():
            classifier(image)
    finally:
        for handle in handles:
            handle.remove()
    for name, module in reversed(found):
        if sides[module] >= SMALLEST_MAP:
            return name, module
    size, least = f"{image.shape[-1]}x{image.shape[-2]}", f"{SMALLEST_MAP}x{SMALLEST_MAP}"
    raise SdaError(f"Grad-CAM finds no stage with {least} positions for images of {size}: use a model for larger ones")


def _is_swin(model: "nn.Module") -> bool:
    from timm.models import SwinTransformer, SwinTransformerV2

    return isinstance(model, SwinTransformer | SwinTransformerV2)


def _channels_first(maps: "Tensor") -> "Tensor":
    """[N, H, W, C], as Swin has them, to [N, C, H, W]."""
    return maps.permute(0, 3, 1, 2)


def _grad_cam() -> Any:
    try:
        from pytorch_grad_cam import GradCAM
    except ImportError as error:
        raise SdaError('Grad-CAM panels need grad-cam: pip install "sda-fast[report]"') from error
    return GradCAM
