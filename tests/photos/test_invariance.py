"""The shipped models: the execution batch changes last bits of a projection, and no prediction."""

import numpy as np
import pytest
import torch

from sda_fast import Projector
from sda_fast.data import corrupt, to_uint8, to_unit
from sda_fast.models import load_adm, load_classifier
from sda_fast.weights import weights_path

pytest.importorskip("imagecorruptions", reason='needs pip install "sda-fast[photos]"')

from sda_fast.photos.dataset import CLASSES, held_out_patches

SIZES = (1, 7, 16)


@pytest.fixture(scope="module")
def patches():
    arrays = [corrupt(held_out_patches(name, 1)[0], "gaussian_noise", 2, seed=3) for name in CLASSES[::2]]
    return to_unit(np.stack(arrays))


@pytest.fixture(scope="module")
def adm():
    return load_adm(weights_path("photos:adm"))


def test_first_step_differs_in_last_bits_only(patches, adm):
    first = [next(Projector(adm, batch_size=size).steps(patches)) for size in SIZES]
    difference = max((a - first[0]).abs().max().item() for a in first[1:])
    print(f"first step, execution batches {SIZES}: largest difference {difference:.1e}")
    assert difference <= 1e-5


@pytest.mark.slow
def test_predictions_are_equal(patches, adm):
    pictures = [to_uint8(Projector(adm, batch_size=size)(patches)) for size in (SIZES[0], SIZES[-1])]
    for name in ("resnet", "convnext"):
        classifier = load_classifier(weights_path(f"photos:{name}"))
        with torch.no_grad():
            predictions = [classifier(to_unit(picture)).argmax(1) for picture in pictures]
        assert torch.equal(*predictions)
