"""The counts of the published models, on fake tensors: nothing of their size is allocated."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sda_fast.bench import TINY, fake_step, make_step, random_model
from sda_fast.engines.ledger import ELEMENTWISE, count
from sda_fast.models import ADM, DiT
from sda_fast.models.presets import ADM_PRESETS, DIT_PRESETS

ADM_256, DIT_XL = ADM_PRESETS["imagenet256"], DIT_PRESETS["dit-xl-2"]
GIGA = 1e9


@pytest.fixture(scope="module")
def adm_256():
    """The guided step of the published ADM in bfloat16, one image."""
    with fake_step(ADM, ADM_256, "bf16", 1) as (step, example):
        return count(step, example)


def conditioning_flops(kind, config, *labels):
    """What a step takes from a table: the embedding of the timestep (and class)."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        kind(**config).conditioning(torch.tensor([500]), *(torch.tensor([label]) for label in labels))
    return counter.get_total_flops()


def test_flops_of_adm_256(adm_256):
    """The published counts of the whole network and of its gradient by the image; a FLOP is half a MAC."""
    forward = adm_256.forward_flops + conditioning_flops(ADM, ADM_256)
    assert forward / GIGA == pytest.approx(2239.67, abs=0.005)
    assert adm_256.backward_flops / GIGA == pytest.approx(2251.74, abs=0.005)
    # The backward pass computes the attention's scores once more: half of its forward products, 12.18 GFLOP.
    assert (adm_256.executed_flops - adm_256.flops) / GIGA == pytest.approx(6.09, abs=0.005)


def test_products_that_phase_convolutions_save(adm_256):
    """Of five convolutions after an upsampling, four ninths remain, and one more row and column."""
    with fake_step(ADM, ADM_256, "bf16", 1, phase_convolutions=True) as (step, example):
        phases = count(step, example)
    sizes = {8: 1024, 16: 1024, 32: 512, 64: 512, 128: 256}  # size of the small image: channels
    saved = sum(2 * c * c * (9 * (2 * n) ** 2 - 16 * (n + 1) ** 2) for n, c in sizes.items())
    assert saved / GIGA == pytest.approx(110, rel=0.05)
    assert adm_256.forward_flops - phases.forward_flops == saved
    assert adm_256.backward_flops - phases.backward_flops == saved


def test_saved_activations_of_adm_256(adm_256):
    """At most 1.0 GB for an image, and no less than the inputs of its 101 normalisations."""
    assert 0.5 * GIGA < adm_256.saved_bytes <= 1.0 * GIGA
    assert adm_256.saved_bytes < adm_256.peak_bytes < 1.2 * GIGA


def test_kernels_and_bytes_of_adm_256(adm_256):
    moved = adm_256.moved
    assert moved["convolution"].kernels == 2 * 106  # all there are, forward and back
    assert moved["normalisation"].kernels == 2 * 101
    assert moved["low-pass gradient"].kernels == 1
    assert adm_256.total.kernels == sum(m.kernels for m in moved.values())
    assert adm_256.total.read > adm_256.weight_bytes  # each weight once, and the images
    # 552.8 million parameters less the 54.3 million of what is a table here; each kernel also as the gradient wants it.
    assert adm_256.weight_bytes / GIGA == pytest.approx(2 * 2 * (0.5528 - 0.0543), rel=0.01)


def test_flops_of_dit_xl_2():
    with fake_step(DiT, DIT_XL, "bf16", 1) as (step, example):
        ledger = count(step, example)
    flops = ledger.forward_flops + conditioning_flops(DiT, DIT_XL, 0)
    assert flops / GIGA == pytest.approx(237.24, abs=0.005)
    assert (ledger.backward_flops, ledger.saved_bytes) == (0, 0)
    assert ledger.executed_flops == ledger.forward_flops


@pytest.mark.parametrize(("precision", "guided"), [("fp16", True), ("fp32", False)])
def test_fake_and_real_tensors_count_alike(precision, guided):
    step = make_step(random_model(*TINY["adm"]), precision, guided)
    real = count(step, step.example(2))
    with fake_step(*TINY["adm"], precision, 2, guided=guided) as (step, example):
        assert count(step, example) == real
    assert (real.backward_flops > real.forward_flops / 2) == guided
    assert (real.saved_bytes > 0) == guided


def test_activations_grow_with_the_batch_and_weights_do_not():
    counts = []
    for batch in (1, 3):
        with fake_step(*TINY["adm"], "bf16", batch) as (step, example):
            counts.append(count(step, example))
    one, three = counts
    assert three.flops == 3 * one.flops
    assert three.weight_bytes == one.weight_bytes
    assert three.saved_bytes == pytest.approx(3 * one.saved_bytes, rel=0.05)


class Shifted(torch.nn.Module):
    """Of x [4, 8]: a view, then one addition of a row and one product."""

    def __init__(self):
        super().__init__()
        self.row, self.matrix = torch.nn.Parameter(torch.ones(8)), torch.nn.Parameter(torch.ones(8, 2))

    def forward(self, x):
        return ((x.reshape(2, 2, 8).reshape(4, 8) + self.row) @ self.matrix,)


def test_every_byte_of_a_small_graph():
    ledger = count(Shifted().requires_grad_(False), (torch.ones(4, 8),), channels_last=False)
    assert ledger.forward_flops == 2 * 4 * 8 * 2
    assert set(ledger.moved) == {ELEMENTWISE, "matrix product"}  # no copy: the views moved nothing
    addition, product = ledger.moved[ELEMENTWISE], ledger.moved["matrix product"]
    assert (addition.kernels, addition.read, addition.written) == (1, 4 * (32 + 8), 4 * 32)
    assert (product.kernels, product.read, product.written) == (1, 4 * (32 + 16), 4 * 8)
    assert ledger.weight_bytes == 4 * (8 + 16)
    assert ledger.peak_bytes == 4 * (32 + 8)  # the sum and the result
