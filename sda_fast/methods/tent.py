"""Tent (Wang et al. 2021): the scales and shifts of the normalisations follow the entropy of the predictions."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sda_fast.errors import SdaError
from sda_fast.methods.adaptation import (
    Adapting,
    MakeOptimizer,
    batch_norms,
    has_one_value,
    optimizer_for,
    parameters_of,
    restore,
)
from sda_fast.methods.base import Cost

if TYPE_CHECKING:
    from sda_fast.projector import Projection

IMAGENET_C = partial(torch.optim.SGD, lr=2.5e-4, momentum=0.9, nesterov=True)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


class Tent(Adapting):
    """One step on the mean entropy of each batch; its predictions are those from before the step.

    It learns from its stream: a result depends on the batch size and on what came before since the last `reset()`.
    Continual: never reset. Per corruption: reset before each. episodic: reset before every batch.

    Batch normalisations use the statistics of the batch alone, as published. LayerNorm and GroupNorm, which the
    original leaves alone, are adapted too, as the community's benchmarks do; their settings for ImageNet-C are the
    defaults (SGD 2.5e-4, momentum 0.9, Nesterov; batches of 64), as the authors publish CIFAR-10-C only (Adam 1e-3,
    batches of 200). The network is in eval mode otherwise, so that nothing is dropped at random.

    optimizer: from the parameters to theirs; lr: in place of the default one's rate. steps: on each batch. Raises
    SdaError for settings out of range and a network without such layers.
    """

    title = "Tent"
    differentiates = True
    batchwise = True
    per_image = False

    def __init__(
        self,
        model: nn.Module,
        projector: "Projection | None" = None,
        optimizer: MakeOptimizer | None = None,
        lr: float | None = None,
        steps: int = 1,
        episodic: bool = False,
    ):
        super().__init__(model, projector)
        if steps < 1:
            raise SdaError(f"steps={steps} is out of range: Tent takes at least 1 per batch")
        self.steps, self.episodic = steps, episodic
        use_batch_statistics(self.adapted)
        self._parameters = parameters_of((m for m in self.adapted.modules() if isinstance(m, NORMS)), "Tent")
        self._make_optimizer = optimizer_for(IMAGENET_C, optimizer, lr)
        self.optimizer = self._make_optimizer(self._parameters)

    def reset(self) -> None:
        restore(self.adapted, self.model)
        self.optimizer = self._make_optimizer(self._parameters)

    def cost(self) -> Cost:
        return Cost(classifier=self.steps, classifier_backward=self.steps)

    def adapt(self, images: Tensor, identities: list[int]) -> Tensor:
        if self.episodic:
            self.reset()
        logits = images
        for _ in range(self.steps):
            logits = tent_step(self.adapted, images, self.optimizer)
        return logits


def tent_step(model: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """One step on the mean of H(y) = -sum_k p_k log p_k; returns the logits [N, K] from before it."""
    logits = model(images).float()
    log_p = logits.log_softmax(dim=1)
    loss = -(log_p.exp() * log_p).sum(dim=1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return logits.detach()


def use_batch_statistics(model: nn.Module) -> None:
    """Let every batch normalisation use the statistics of its batch, for good, in eval mode too."""
    for norm in batch_norms(model):
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = None
        norm.forward = partial(_forward, norm.forward)  # type: ignore[method-assign]


def _forward(forward: Any, x: Tensor) -> Tensor:
    # PyTorch refuses one value per channel. Of the value twice, mean and (biased) variance are the same.
    return forward(torch.cat([x, x]))[:1] if has_one_value(x) else forward(x)
