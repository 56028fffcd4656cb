"""The ensembles of DDA and SDA: scores of the original image p and of its projection q -> scores of the pair.

Both are class scores [N, K], one row per image. The published evaluation calls them logits and applies a
softmax to them once more, although its classifiers already return probabilities: entropy H and confidence C
below are those of softmax(p), not of p. They are kept so, because the weights of the `*_sum` modes depend
on it.

    sum             p + q                                the mode of the published evaluations
    first           p
    second          q
    entropy         q where H(q) <= H(p), else p
    confidence      q where C(q) >= C(p), else p         C = largest class probability
    var             q where Var(q) >= Var(p), else p     unbiased variance of the scores themselves
    entropy_sum     H(q) p + H(p) q                      each weighted with the entropy of the other
    confidence_sum  C(p) p + C(q) q
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Mode = Literal["sum", "first", "second", "entropy", "confidence", "var", "entropy_sum", "confidence_sum"]
MODES: tuple[Mode, ...] = get_args(Mode)


def entropy(scores: Tensor) -> Tensor:
    """Entropy in nats of softmax(scores), [N, K] -> [N, 1]."""
    return torch.special.entr(scores.softmax(dim=1)).sum(dim=1, keepdim=True)


def confidence(scores: Tensor) -> Tensor:
    """Largest class probability of softmax(scores), [N, K] -> [N, 1]."""
    return scores.softmax(dim=1).amax(dim=1, keepdim=True)


def combine(original: Tensor, projected: Tensor, mode: Mode = "sum") -> Tensor:
    """Combined scores [N, K] of `original` and `projected`, both [N, K]; formulas above.

    Raises ValueError for an unknown mode or unequal shapes.
    """
    p, q = original, projected
    if p.shape != q.shape:
        raise ValueError(f"scores of original and projection differ in shape: {p.shape} and {q.shape}")
    match mode:
        case "sum":
            return p + q
        case "first":
            return p
        case "second":
            return q
        case "entropy":
            return torch.where(entropy(q) <= entropy(p), q, p)
        case "confidence":
            return torch.where(confidence(q) >= confidence(p), q, p)
        case "var":
            return torch.where(q.var(dim=1, keepdim=True) >= p.var(dim=1, keepdim=True), q, p)
        case "entropy_sum":
            return entropy(q) * p + entropy(p) * q
        case "confidence_sum":
            return confidence(p) * p + confidence(q) * q
    raise ValueError(f"unknown ensemble mode {mode!r}; one of {', '.join(MODES)}")
