"""How the scores of an image and of its projection become one prediction."""

from torch import Tensor

from sda_fast.errors import SdaError
from sda_fast.reference.ensembles import MODES, Mode, combine

__all__ = ["MODES", "Mode", "combine_scores"]


def combine_scores(original: Tensor, projected: Tensor, mode: Mode = "sum") -> Tensor:
    """Class scores of the pair, [N, K], from probabilities of the original and of its projection, both [N, K].

    "sum" is what DDA and SDA publish; the formulas of all modes stand in `sda_fast.reference.ensembles`.
    Raises SdaError for an unknown mode or scores of different shapes.
    """
    if mode not in MODES:
        raise SdaError(f"ensemble mode {mode!r} is not known; choose one of {', '.join(MODES)}")
    if original.ndim != 2 or original.shape != projected.shape:
        raise SdaError(
            f"scores must be [N, K] and alike, not {list(original.shape)} and {list(projected.shape)}; "
            "both models must have the same classes"
        )
    return combine(original, projected, mode)
