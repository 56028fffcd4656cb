"""What a step of fine-tuning does to the weights: the learning rate, the optimizer, the loss."""

import math

import torch
from torch import Tensor, nn

from sda_fast.stages.recipes import Recipe

_NEVER_DECAYED = ("relative_position_bias_table", "absolute_pos_embed")


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The rate of a step, counted from 0 over all epochs: the warm-up moves with every step, the decay once per epoch.

    As mmengine's LinearLR (by iteration) with CosineAnnealingLR or MultiStepLR (by epoch).
    """
    warmup = recipe.warmup_epochs * steps_per_epoch
    if step < warmup:
        if recipe.warmup_start is None:
            return recipe.lr * max(step / warmup, 1e-8)
        return recipe.lr * (recipe.warmup_start + (1 - recipe.warmup_start) * step / max(1, warmup - 1))
    epoch = step // steps_per_epoch
    if recipe.schedule == "step":
        return recipe.lr * 0.1 ** sum(epoch >= milestone for milestone in recipe.milestones)
    span = max(1, recipe.epochs - recipe.warmup_epochs)
    return recipe.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (epoch - recipe.warmup_epochs) / span)))


def make_optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer; AdamW does not decay biases, norms, other one-dimensional parameters, position tables."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(module.parameters(), recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)
    from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]

    tables = [name for name, _ in module.named_parameters() if name.endswith(_NEVER_DECAYED)]
    groups = param_groups_weight_decay(module, recipe.weight_decay, no_weight_decay_list=tables)
    return torch.optim.AdamW(groups, recipe.lr, betas=(0.9, 0.999), eps=1e-8)


def part_loss(logits: Tensor, labels: Tensor, recipe: Recipe) -> Tensor:
    """Mean cross-entropy of logits [N, K] and labels int64 [N]; smoothed labels are 1 - s + s/K and s/K."""
    return nn.functional.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
