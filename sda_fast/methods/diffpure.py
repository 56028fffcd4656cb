"""DiffPure (Nie et al. 2022): the classifier on the purified image, without an ensemble."""

from torch import Tensor

from sda_fast.methods.base import Method, probabilities


class DiffPure(Method):
    title = "DiffPure"
    projection = "diffpure"

    def scores(self, images: Tensor, projected: Tensor) -> Tensor:
        return probabilities(self.model, projected)
