"""Source: the classifier as it is, on the image as it comes."""

from torch import Tensor

from sda_fast.methods.base import Method, probabilities


class Source(Method):
    title = "Source"

    def scores(self, images: Tensor, projected: Tensor) -> Tensor:
        return probabilities(self.model, images)
