"""SDA: the source model on the image, the model fine-tuned on aligned synthetic images on its guided projection."""

from torch import Tensor, nn

from sda_fast.methods.base import Method, probabilities
from sda_fast.methods.ensembles import Mode, combine_scores
from sda_fast.projector import Projection


class SDA(Method):
    """`finetuned` is a second classifier with the classes of `model`."""

    title = "SDA"
    projection = "dda"
    ensemble = True
    finetuned = True

    def __init__(self, model: nn.Module, finetuned: nn.Module, projector: Projection | None = None, mode: Mode = "sum"):
        super().__init__(model, projector)
        self.finetuned_model = finetuned.eval()
        self.mode = mode

    def scores(self, images: Tensor, projected: Tensor) -> Tensor:
        original, aligned = probabilities(self.model, images), probabilities(self.finetuned_model, projected)
        return combine_scores(original, aligned, self.mode)
