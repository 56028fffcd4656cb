"""Score combinations of the reference against SDA's evaluation."""

import pytest
import torch

from sda_fast.reference import MODES, combine


@pytest.mark.parametrize("mode", MODES)
def test_scores_match_the_original(load_reference, mode):
    tensors, _ = load_reference("ensembles")
    scores = combine(tensors["scores_original"], tensors["scores_projected"], mode)
    torch.testing.assert_close(scores, tensors[mode], rtol=1e-6, atol=1e-6)


def test_every_mode_of_the_original_is_there(load_reference):
    tensors, _ = load_reference("ensembles")
    assert set(MODES) == {name for name in tensors if not name.startswith("scores_")}


@pytest.mark.parametrize("mode", ["entropy", "confidence", "var"])
def test_selection_takes_whole_rows_and_the_projection_on_a_tie(mode):
    sure, unsure = torch.tensor([[0.9, 0.05, 0.05]]), torch.tensor([[0.4, 0.3, 0.3]])
    assert torch.equal(combine(sure, unsure, mode), sure)
    assert torch.equal(combine(unsure, sure, mode), sure)
    low, high = torch.full((1, 4), 0.25), torch.full((1, 4), 0.5)  # equal after the softmax, no variance
    assert torch.equal(combine(low, high, mode), high)


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="nonsense"):
        combine(torch.ones(2, 3), torch.ones(2, 3), "nonsense")
    with pytest.raises(ValueError, match="shape"):
        combine(torch.ones(2, 3), torch.ones(1, 3))
