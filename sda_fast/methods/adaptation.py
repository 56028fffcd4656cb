"""What the methods that change the classifier share: a copy to change, the way back, and what is random."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sda_fast.errors import SdaError
from sda_fast.methods.base import Method, probabilities

if TYPE_CHECKING:
    from sda_fast.projector import Projection

# From the parameters that are adapted to their optimiser, e.g. partial(torch.optim.SGD, lr=1e-3).
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
AnyModule = TypeVar("AnyModule", bound=nn.Module)


def optimizer_for(
    published: Callable[..., torch.optim.Optimizer], given: MakeOptimizer | None, lr: float | None
) -> MakeOptimizer:
    """What is given, or else what is published, at the rate `lr` where that is not None. Raises SdaError for both."""
    if lr is None:
        return given or published
    if given is not None:
        raise SdaError("lr is that of the published optimizer: give your own its rate, or leave one of them out")
    if not 0 < lr < math.inf:
        raise SdaError(f"lr={lr} is out of range: give more than 0")
    return partial(published, lr=lr)


class Adapting(Method):
    """A method that changes weights: those of `self.adapted`, a copy, while `self.model` stays the source model.

    With a projector (or projections given) it adapts to the projections, and predicts on them, instead of the images.
    """

    on_request: ClassVar[bool] = True
    batchwise: ClassVar[bool] = False

    def __init__(self, model: nn.Module, projector: "Projection | None" = None):
        super().__init__(model, projector)
        self.adapted = working_copy(self.model)

    def adapt(self, images: Tensor, identities: list[int]) -> Tensor:
        """Logits [N, K] of images [N, 3, H, W]; of one image at a time where the method is not `batchwise`."""
        raise NotImplementedError  # each method's own file

    def __call__(
        self, images: Tensor, projected: Tensor | None = None, seeds: Sequence[int] | Tensor | None = None
    ) -> Tensor:
        """Probabilities, float32 [N, K]; arguments as in `Method`. Raises SdaError for images that are not finite."""
        identities = identities_of(seeds, len(images))
        if projected is None:
            projected = images if self.projector is None else self.projector(images, seeds=identities)
        if not bool(projected.isfinite().all()):  # they would stay in the weights
            raise SdaError("images hold NaN or infinity; check what made them")
        if not len(images):
            with torch.no_grad():
                return probabilities(self.model, images)
        size = len(images) if self.batchwise else 1
        with torch.inference_mode(False), torch.enable_grad():
            parts = projected.detach().clone().split(size)
            logits = [self.adapt(part, identities[i * size : (i + 1) * size]) for i, part in enumerate(parts)]
        return torch.cat(logits).detach().float().softmax(dim=1)


@torch.inference_mode(False)
def working_copy(model: AnyModule) -> AnyModule:
    """A copy in eval mode, no parameter of which asks for a gradient yet."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def restore(adapted: nn.Module, source: nn.Module) -> None:
    """Give `adapted`, a copy of `source`, its parameters again."""
    original = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(original[name])
                parameter.grad = None


def parameters_of(modules: Iterable[nn.Module], whose: str) -> list[nn.Parameter]:
    """The modules' parameters, each once, from now on with gradients. Raises SdaError if there are none."""
    found = list(dict.fromkeys(p for module in modules for p in module.parameters()))
    if not found:
        raise SdaError(f"the classifier has no parameters that {whose} adapts: use another method")
    for parameter in found:
        parameter.requires_grad_()
    return found


def batch_norms(model: nn.Module) -> Iterator[nn.modules.batchnorm._BatchNorm]:
    """Every batch normalisation of a network, timm's kinds included."""
    return (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


def has_one_value(x: Tensor) -> bool:
    """Whether there is one value per channel of x [N, C, ...], so that a batch has a mean but no variance."""
    return x.numel() == x.shape[1]


def generator(seed: int, identity: int) -> np.random.Generator:
    """The random numbers of one image, counter-based: a function of both and of nothing drawn before."""
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, identity % 2**64], np.uint64)))


def resized(images: Tensor, size: int) -> Tensor:
    """Images [N, 3, H, W] as [N, 3, size, size], bilinear with antialiasing where they are not so already."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def identities_of(seeds: Sequence[int] | Tensor | None, n: int) -> list[int]:
    """One integer per image, by default 0, 1, ... Raises SdaError for anything else."""
    identities = list(range(n)) if seeds is None else seeds.tolist() if isinstance(seeds, Tensor) else list(seeds)
    if len(identities) != n or not all(isinstance(i, int) for i in identities):
        raise SdaError(f"seeds must be one integer for each of the {n} images")
    return identities
