"""What all methods have in common."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sda_fast.errors import SdaError
from sda_fast.projector import Projection


class Method:
    """Class probabilities of images, with or without their projections.

    model: from images [N, 3, H, W] in [-1, 1] to logits [N, K]; used in eval mode. projector: makes the projections
    where none are given (a `Projector`, a `Purifier`, or anything called alike).
    """

    title: ClassVar[str]
    projection: ClassVar[str | None] = None
    finetuned: ClassVar[bool] = False
    ensemble: ClassVar[bool] = False

    def __init__(self, model: nn.Module, projector: Projection | None = None):
        self.model = model.eval()
        self.projector = projector

    def scores(self, images: Tensor, projected: Tensor) -> Tensor:
        """Probabilities (or their combination) [N, K] from images and projections [N, 3, H, W].

        Where the method asks for no projection, `projected` is `images`.
        """
        raise NotImplementedError  # each method's own file

    def __call__(
        self, images: Tensor, projected: Tensor | None = None, seeds: Sequence[int] | Tensor | None = None
    ) -> Tensor:
        """Scores [N, K] of images [N, 3, H, W] in [-1, 1]; the largest is the prediction.

        projected: the images' projections, if they exist; else they are made, `seeds` being the images' identities.
        Raises SdaError if a projection is needed and there is neither one nor a projector.
        """
        if self.projection is not None and projected is None:
            if self.projector is None:
                raise SdaError(f"{self.title} needs projected images or a projector: pass projector=...")
            projected = self.projector(images, seeds=seeds)
        with torch.no_grad():
            return self.scores(images, images if projected is None else projected)


def probabilities(model: Any, images: Tensor) -> Tensor:
    """softmax(model(images)), float32 [N, K]."""
    return model(images).float().softmax(dim=1)
