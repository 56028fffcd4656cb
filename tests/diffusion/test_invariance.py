"""What a projection must not depend on: the other images, their order, padding; and on what it may depend a little."""

import pytest
import torch

from sda_fast import Projector
from sda_fast.models import load_adm
from sda_fast.ops import philox_normal
from sda_fast.projector import Purifier
from sda_fast.reference import UNet, guided_projection

SHORT = {"respacing": "20", "start": 4, "factor": 2}
IMAGES = torch.rand(9, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
SEEDS = torch.tensor([11, -3, 2**62, 5, 7, 0, 1, 2**40, -(2**63)])


@pytest.fixture(scope="module")
def adm(tiny):
    return load_adm(tiny.adm)


def guided(adm, batch_size):
    return Projector(adm, batch_size=batch_size, **SHORT)


def purifying(adm, batch_size):
    return Purifier(adm, 4, "20", batch_size=batch_size)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("make", [guided, purifying])
@pytest.mark.parametrize("batch_size", [4, 7])
def test_an_image_does_not_depend_on_the_others(adm, make, batch_size, layout):
    project, images = make(adm, batch_size), IMAGES.to(memory_format=layout)
    together = project(images, seeds=SEEDS)
    for subset in ([8, 2, 5, 0, 7, 1, 3, 6, 4], [6, 3, 8, 1, 0, 5, 7], [1, 7, 4, 2], [8, 0], [3]):
        assert torch.equal(project(images[subset], seeds=SEEDS[subset]), together[subset]), subset


def test_an_image_does_not_depend_on_what_pads_its_batch(adm):
    # The same image in a full batch of very different ones, and padded with itself.
    project = guided(adm, 4)
    others = torch.cat([IMAGES[:1], torch.ones(2, 3, 16, 16), torch.full((1, 3, 16, 16), -1.0)])
    assert torch.equal(project(others, seeds=SEEDS[:4])[:1], project(IMAGES[:1], seeds=SEEDS[:1]))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("norm_group", "batch_size"), [(2, 4), (4, 4), (7, 7)])
def test_whole_groups_may_move(adm, norm_group, batch_size, layout):
    project = Projector(adm, norm="batch", norm_group=norm_group, batch_size=batch_size, **SHORT)
    images = IMAGES.to(memory_format=layout)
    together = project(images, seeds=SEEDS)
    groups = torch.arange(9).split(norm_group)
    *whole, partial = groups  # the last one is smaller and stays last
    moved = torch.cat([*reversed(whole), partial])
    assert torch.equal(project(images[moved], seeds=SEEDS[moved]), together[moved])
    for group in groups:
        assert torch.equal(project(images[group], seeds=SEEDS[group]), together[group])


@pytest.mark.parametrize(("norm_group", "batch_size"), [(2, 4), (4, 4), (4, 8)])
def test_padding_does_not_count_in_the_norm_of_a_partial_group(adm, norm_group, batch_size):
    project = Projector(adm, norm="batch", norm_group=norm_group, batch_size=batch_size, **SHORT)
    together = next(project.steps(IMAGES[:7], seeds=SEEDS[:7]))
    unet = UNet(**adm.config).eval()
    unet.load_state_dict(adm.state_dict())
    for group in torch.arange(7).split(norm_group):
        shape = IMAGES[group].shape
        noise = torch.stack([philox_normal(shape, seed=0, identities=SEEDS[group], step=k) for k in range(5)])
        first = next(guided_projection(unet, IMAGES[group], noise, **SHORT))
        assert (together[group] - first.sample).abs().mean() <= 1e-6


def test_between_execution_batches_only_last_bits_differ(adm):
    images = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    first = {size: next(guided(adm, size).steps(images)) for size in (1, 7, 64)}
    largest = {size: float((first[size] - first[64]).abs().max()) for size in (1, 7)}
    print(f"largest difference of the first step from a batch of 64: {largest}")
    assert max(largest.values()) <= 1e-5, largest


def test_between_numbers_of_threads_only_last_bits_differ(adm):
    one = next(guided(adm, 7).steps(IMAGES))
    torch.set_num_threads(2)
    difference = float((next(guided(adm, 7).steps(IMAGES)) - one).abs().max())
    print(f"largest difference of the first step between one thread and two: {difference:.1e}")
    assert difference <= 1e-5
