"""Crops and patches: what they show, what they do not, and that gradients pass."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sda_fast.methods.adaptation import generator
from sda_fast.methods.views import _moved_corners, random_box, random_crops, random_patches

IMAGE = torch.rand(1, 3, 40, 60, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_boxes_lie_inside_and_keep_to_area_and_ratio():
    boxes = np.array([random_box(generator(0, i), (60, 40)) for i in range(500)])
    left, top, right, bottom = boxes.T
    assert ((left >= 0) & (left < right) & (right <= 60)).all()
    assert ((top >= 0) & (top < bottom) & (bottom <= 40)).all()
    width, height = right - left, bottom - top
    share, ratio = width * height / 2400, width / height
    assert 0.07 < share.min() < 0.15 < 0.8 < share.max() <= 1
    assert 0.7 < ratio.min() < 0.8 < 1.25 < ratio.max() < 1.45  # 3/4 to 4/3, rounded to pixels


def test_crops_are_those_of_their_boxes():
    rng = generator(0, 3)
    expected = []
    for _ in range(4):
        left, top, right, bottom = random_box(rng, (60, 40))
        crop = F.interpolate(IMAGE[..., top:bottom, left:right], (8, 8), mode="bilinear", antialias=True)
        expected.append(crop.flip(-1) if rng.random() < 0.5 else crop)
    assert torch.equal(random_crops(IMAGE, 4, 8, generator(0, 3)), torch.cat(expected))
    assert len({c.numpy().tobytes() for c in expected}) == 4


@pytest.mark.parametrize("cut", [lambda x, rng: random_crops(x, 3, 16, rng), lambda x, rng: random_patches(x, 3, rng)])
def test_gradients_pass_to_what_is_shown(cut):
    x = IMAGE.clone().requires_grad_()
    views = cut(x, generator(0, 1))
    (g,) = torch.autograd.grad(views.square().sum(), x)
    assert g.isfinite().all()
    assert g.abs().sum((2, 3)).gt(0).all()
    assert torch.equal(views, cut(x, generator(0, 1)))
    assert not torch.equal(views, cut(x, generator(1, 1)))


def test_patches_lie_turned_and_small_in_black():
    patches = random_patches(torch.ones_like(IMAGE), 40, generator(0, 2))
    assert patches.shape == (40, 3, 224, 224)
    assert patches.min() == -1
    assert patches.max() == pytest.approx(1)
    shown = (patches[:, 0] > 0).float().mean((1, 2))
    assert 0.02 < shown.min() < shown.max() < 0.75**2  # made smaller, and by the perspective
    assert (patches[:, 0, 0, 0] == -1).float().mean() > 0.9  # turned: corners are black


def test_corners_move_inwards_by_three_tenths_of_the_side_at_most():
    moved = np.array([_moved_corners(224, generator(0, i)) for i in range(300)])
    for corner, (x, y) in zip(moved.transpose(1, 0, 2), ((0, 0), (223, 0), (223, 223), (0, 223)), strict=True):
        inward = np.abs(corner - (x, y))
        assert (inward.min(), inward.max()) == (0, 67)
        assert ((corner >= 0) & (corner <= 223)).all()
