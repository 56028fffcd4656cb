"""What all methods have in common."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from sda_fast.errors import SdaError

if TYPE_CHECKING:  # the projector brings the diffusion models with it, which not every method needs
    from sda_fast.projector import Projection


class Cost(NamedTuple):
    """Network evaluations for one image: how many images pass each network forward, and back.

    An adaptation step on 64 views of an image counts 64 of each.
    """

    classifier: int = 0
    classifier_backward: int = 0
    diffusion: int = 0
    diffusion_backward: int = 0


class Method:
    """Class probabilities of images, with or without their projections.

    model: from images [N, 3, H, W] in [-1, 1] to logits [N, K]; used in eval mode, never changed. projector: makes the
    projections where none are given (a `Projector`, a `Purifier`, or anything called alike).
    """

    title: ClassVar[str]
    projection: ClassVar[str | None] = None
    finetuned: ClassVar[bool] = False
    ensemble: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()
    on_request: ClassVar[bool] = False
    differentiates: ClassVar[bool] = False  # goes back through the classifier, which must be the module itself
    revision: ClassVar[int] = 1  # rises with a change of its results, so that a folder does not mix them
    per_image: bool = True

    def __init__(self, model: nn.Module, projector: "Projection | None" = None):
        self.model = model.eval()
        self.projector = projector

    def scores(self, images: Tensor, projected: Tensor) -> Tensor:
        """Probabilities (or their combination) [N, K] from images and projections [N, 3, H, W].

        Where the method asks for no projection, `projected` is `images`.
        """
        raise NotImplementedError  # each method's own file

    def reset(self) -> None:
        """Forget what earlier images taught; most methods learn nothing that lasts."""

    def cost(self) -> Cost:
        """What one image costs, the projection included where a projector of this package makes it."""
        classifier = 2 if self.ensemble else 1
        steps = getattr(self.projector, "start", 0) if self.projection else 0
        # DDA's guidance goes back through the network at every step, as published.
        back = self.projection == "dda" and not getattr(self.projector, "jacobian_free", False)
        return Cost(classifier, 0, steps, steps if back else 0)

    def __call__(
        self, images: Tensor, projected: Tensor | None = None, seeds: Sequence[int] | Tensor | None = None
    ) -> Tensor:
        """Scores [N, K] of images [N, 3, H, W] in [-1, 1]; the largest is the prediction.

        projected: the images' projections, if they exist; else they are made. seeds: one integer per image, its
        identity (default 0, 1, ...), on which all that is random depends.
        Raises SdaError if a projection is needed and there is neither one nor a projector.
        """
        if self.projection is not None and projected is None:
            if self.projector is None:
                raise SdaError(f"{self.title} needs projected images or a projector: pass projector=...")
            projected = self.projector(images, seeds=seeds)
        with torch.no_grad():
            return self.scores(images, images if projected is None else projected)


def predictions(method: Method, scores: Tensor) -> Tensor:
    """The class of each image, int64 [N], by a method's scores [N, K]. Raises SdaError if one of them is no number."""
    if not scores.isfinite().all():
        raise SdaError(
            f"{method.title} gives scores that are no finite numbers: check the classifier's weights, or with a method "
            "that changes them give it a smaller lr by --option"
        )
    return scores.argmax(dim=1)


def probabilities(model: Any, images: Tensor) -> Tensor:
    """softmax(model(images)), float32 [N, K]."""
    return model(images).float().softmax(dim=1)
