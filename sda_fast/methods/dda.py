"""DDA (Gao et al. 2023): the source model on the image and on its guided projection."""

from torch import Tensor, nn

from sda_fast.methods.base import Method, probabilities
from sda_fast.methods.ensembles import Mode, combine_scores
from sda_fast.projector import Projection


class DDA(Method):
    title = "DDA"
    projection = "dda"
    ensemble = True

    def __init__(self, model: nn.Module, projector: Projection | None = None, mode: Mode = "sum"):
        super().__init__(model, projector)
        self.mode = mode

    def scores(self, images: Tensor, projected: Tensor) -> Tensor:
        original, aligned = probabilities(self.model, images), probabilities(self.model, projected)
        return combine_scores(original, aligned, self.mode)
