"""combine_scores against SDA's evaluation."""

import pytest
import torch

import sda_fast
from sda_fast.errors import SdaError
from sda_fast.methods.ensembles import MODES, combine_scores


def test_every_mode_matches_the_original(load_reference):
    tensors, _ = load_reference("ensembles")
    assert {name for name in tensors if not name.startswith("scores_")} == set(MODES)
    for mode in MODES:
        scores = combine_scores(tensors["scores_original"], tensors["scores_projected"], mode)
        assert (scores - tensors[mode]).abs().max() <= 1e-6, mode


def test_the_sum_is_the_default():
    p, q = torch.rand(2, 4, 3)
    assert torch.equal(combine_scores(p, q), p + q)
    assert sda_fast.combine_scores is combine_scores


def test_an_unknown_mode_is_refused():
    with pytest.raises(SdaError, match="ensemble mode 'product' is not known; choose one of sum, first"):
        combine_scores(torch.ones(2, 3), torch.ones(2, 3), "product")


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((2, 3), (1, 3)), ((3,), (3,))])
def test_scores_that_do_not_fit_are_refused(shapes):
    with pytest.raises(SdaError, match=r"scores must be \[N, K\] and alike"):
        combine_scores(*map(torch.ones, shapes))
