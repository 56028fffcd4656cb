"""MEMO (Zhang, Levine & Finn 2022): for every image one step on the entropy of its views' mean prediction."""

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sda_fast.errors import SdaError
from sda_fast.methods.adaptation import (
    Adapting,
    MakeOptimizer,
    batch_norms,
    generator,
    has_one_value,
    optimizer_for,
    parameters_of,
    restore,
)
from sda_fast.methods.augmix import DARK_RED, Colour, augmix_views
from sda_fast.methods.base import Cost

if TYPE_CHECKING:
    from sda_fast.projector import Projection


class MEMO(Adapting):
    """All parameters take one step on `views` AugMix views, then predict the image itself, then are restored.

    optimizer: by default as published, SGD 2.5e-4 without momentum for networks with batch normalisation (published:
    ResNet-50) and AdamW 1e-5, weight decay 0.01, for the others (and, published, ResNeXt); lr: in place of its rate.
    steps: on the same views.
    prior: batch normalisations use prior / (prior + 1) of the source's statistics and the rest of the current ones,
    of the views and then of the one image; None uses the source's alone. fill: what moved views show beyond their
    edge, see `augmix.DARK_RED`. Random numbers depend on `seed` and the image's identity.

    leak_optimizer_state: keep the optimiser from image to image, as the published code does, whose AdamW moments thus
    carry over; a result then depends on the images before it, until `reset()`.

    Raises SdaError for settings out of range.
    """

    title = "MEMO"
    differentiates = True

    def __init__(
        self,
        model: nn.Module,
        projector: "Projection | None" = None,
        views: int = 64,
        optimizer: MakeOptimizer | None = None,
        lr: float | None = None,
        steps: int = 1,
        prior: float | None = 16.0,
        fill: Colour = DARK_RED,
        leak_optimizer_state: bool = False,
        seed: int = 0,
    ):
        super().__init__(model, projector)
        if views < 1 or steps < 1:
            raise SdaError(f"views={views}, steps={steps} are out of range: MEMO takes at least 1 of each")
        if prior is not None and not 0 <= prior < math.inf:
            raise SdaError(f"prior={prior} is out of range: 16 is published, None is the source's statistics alone")
        if len(fill) != 3 or not all(0 <= level <= 255 for level in fill):
            raise SdaError(f"fill={fill} is out of range: give three numbers from 0 to 255")
        self.views, self.steps, self.fill, self.seed = views, steps, fill, seed
        self.per_image = not leak_optimizer_state
        self._parameters = parameters_of([self.adapted], "MEMO")
        self._make_optimizer = optimizer_for(published_optimizer(self.adapted), optimizer, lr)
        self.optimizer = self._make_optimizer(self._parameters)
        if prior is not None:
            use_prior(self.adapted, prior)

    def reset(self) -> None:
        restore(self.adapted, self.model)
        self.optimizer = self._make_optimizer(self._parameters)

    def cost(self) -> Cost:
        return Cost(classifier=self.views * self.steps + 1, classifier_backward=self.views * self.steps)

    def adapt(self, images: Tensor, identities: list[int]) -> Tensor:
        rng = generator(self.seed, identities[0])
        size = getattr(self.model, "input_size", None)
        views = augmix_views(images[0], self.views, rng, size, self.fill).to(images)
        try:
            for _ in range(self.steps):
                memo_step(self.adapted, views, self.optimizer)
            with torch.no_grad():
                return self.adapted(images)
        finally:
            restore(self.adapted, self.model)
            if self.per_image:
                self.optimizer = self._make_optimizer(self._parameters)


def published_optimizer(model: nn.Module) -> MakeOptimizer:
    """MEMO's optimiser for the family of a network."""
    if any(batch_norms(model)):
        return partial(torch.optim.SGD, lr=2.5e-4)
    return partial(torch.optim.AdamW, lr=1e-5, weight_decay=0.01)


def memo_step(model: nn.Module, views: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """One step on the marginal entropy of views [B, 3, H, W]; returns it, from before the step."""
    loss = marginal_entropy(model(views).float())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def marginal_entropy(logits: Tensor) -> Tensor:
    """H of the mean over the views of p(y | x_b), from logits [B, K] (equation 3)."""
    log_p = logits.log_softmax(dim=1).logsumexp(dim=0) - math.log(len(logits))
    return -(log_p.exp() * log_p).sum()


def use_prior(model: nn.Module, prior: float) -> None:
    """Let every batch normalisation mix its statistics with those of each batch, `prior` to one, for good.

    As published, the mixed statistics are constants to the gradient, and the batch's variance is the unbiased one.
    Where a batch has one value per channel, and so no such variance, the source's statistics stand.
    """
    for norm in batch_norms(model):
        if norm.running_mean is not None and norm.running_var is not None:
            mix = partial(_mix, source=(norm.running_mean, norm.running_var), weight=prior / (prior + 1))
            norm.register_forward_pre_hook(mix)


def _mix(norm: Any, inputs: tuple[Tensor], source: tuple[Tensor, Tensor], weight: float) -> None:
    (x,) = inputs
    mean, variance = source
    if not has_one_value(x):
        with torch.no_grad():
            over = [d for d in range(x.ndim) if d != 1]
            batch_variance, batch_mean = torch.var_mean(x, dim=over, correction=1)
            mean, variance = torch.lerp(batch_mean, mean, weight), torch.lerp(batch_variance, variance, weight)
    # New tensors, not new values: the backward pass of an earlier batch may still want the old ones.
    norm.running_mean, norm.running_var = mean, variance
