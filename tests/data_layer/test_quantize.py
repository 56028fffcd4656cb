import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import save_image

from sda_fast.data import to_uint8, to_unit
from sda_fast.errors import SdaError

LEVELS = np.arange(256, dtype=np.uint8)


def grid(x: torch.Tensor) -> torch.Tensor:
    """A vector of values as [N, 3, 4, 4], padded with zeros."""
    padded = torch.zeros(-(-len(x) // 48) * 48, dtype=x.dtype)
    padded[: len(x)] = x
    return padded.reshape(-1, 3, 4, 4)


def values() -> torch.Tensor:
    """All over [-1, 1] and beyond, with every exact tie and every level in float32."""
    ties = (torch.arange(256, dtype=torch.float64) + 0.5) / 127.5 - 1
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    edges = torch.tensor([-1e30, -1.5, -1.0, -0.0, 0.0, 1.0, 1.0000001, 2.0, 1e30])
    exact = torch.cat([ties.float(), levels.float()])
    beside = [exact.nextafter(torch.tensor(s)) for s in (-torch.inf, torch.inf)]
    return torch.cat(
        [edges, exact, *beside, torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1]
    )


def test_to_unit_is_the_original_formula_to_the_bit():
    image = np.stack([LEVELS, LEVELS[::-1], np.roll(LEVELS, 7)], axis=-1).reshape(16, 16, 3)
    x = to_unit(image)
    assert x.dtype == torch.float32
    assert x.shape == (1, 3, 16, 16)
    assert x.is_contiguous()
    expected = (image.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]
    np.testing.assert_array_equal(x.numpy(), expected)
    assert torch.equal(to_unit(torch.from_numpy(image)), x)
    assert torch.equal(to_unit(np.stack([image, image]))[1], x[0])
    assert torch.equal(to_unit(image[:, ::-1]), x.flip(3))
    assert (x.min(), x.max()) == (-1, 1)


@pytest.mark.parametrize("mode", ["round", "truncate"])
def test_every_level_survives_the_way_there_and_back(mode):
    image = np.broadcast_to(LEVELS.reshape(1, 16, 16, 1), (2, 16, 16, 3))
    back = to_uint8(to_unit(image), mode)
    assert back.dtype == np.uint8
    assert back.shape == (2, 16, 16, 3)
    assert back.flags.c_contiguous
    np.testing.assert_array_equal(back, image)


def test_round_is_what_torchvision_stores(tmp_path):
    x = grid(values())
    stored = []
    for i, image in enumerate(x[:600]):  # holds all edges, ties and levels
        save_image((image + 1) / 2, tmp_path / f"{i}.png")
        stored.append(np.array(Image.open(tmp_path / f"{i}.png")))
    np.testing.assert_array_equal(to_uint8(x[:600], "round"), np.stack(stored))
    assert np.array_equal(to_uint8(x), to_uint8(x, "round"))
    formula = ((x + 1) / 2).mul(255).add_(0.5).clamp_(0, 255).permute(0, 2, 3, 1).to(torch.uint8)
    np.testing.assert_array_equal(to_uint8(x, "round"), formula.numpy())


def test_truncate_is_what_the_dit_sampler_stores():
    x = grid(values())
    formula = np.clip(np.float32(127.5) * x.numpy() + np.float32(128), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(to_uint8(x, "truncate"), formula)


def test_the_modes_differ_by_rounding_alone():
    x = grid(values())
    a, b = to_uint8(x, "round").astype(int), to_uint8(x, "truncate").astype(int)
    assert abs(a - b).max() == 1
    assert (a != b).mean() < 1e-2


def test_the_input_is_left_alone_and_half_precision_is_widened():
    x = grid(values()).clamp(-1, 1).requires_grad_()
    copy = x.detach().clone()
    to_uint8(x)
    assert torch.equal(x, copy)
    for dtype in (torch.float16, torch.bfloat16):
        half = copy.to(dtype)
        np.testing.assert_array_equal(to_uint8(half), to_uint8(half.float()))


def test_bytes_travel_to_the_device(monkeypatch):
    move, moved = torch.Tensor.to, []

    def to(x, *arguments, **named):
        moved.append((x.dtype, *arguments))
        return move(x, *arguments, **named)

    monkeypatch.setattr(torch.Tensor, "to", to)
    x = to_unit(np.zeros((2, 4, 5, 3), np.uint8), "meta")
    assert (x.device.type, x.dtype, x.shape) == ("meta", torch.float32, (2, 3, 4, 5))
    assert moved[0] == (torch.uint8, "meta")


def test_what_cannot_be_stored_is_refused():
    x = torch.zeros(3, 3, 4, 4)
    x[1, 0, 0, 0], x[2, 1, 2, 3] = torch.nan, torch.inf
    with pytest.raises(SdaError, match="2 of 3 images hold NaN"):
        to_uint8(x)
    with pytest.raises(SdaError, match="nearest"):
        to_uint8(x[:1], "nearest")
    for array in (np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8)):
        with pytest.raises(SdaError, match="to_unit takes uint8"):
            to_unit(array)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_bits():
    x = grid(values())
    image = torch.from_numpy(LEVELS.reshape(1, 16, 16, 1)).expand(1, 16, 16, 3)
    assert torch.equal(to_unit(image.cuda()).cpu(), to_unit(image))
    for mode in ("round", "truncate"):
        np.testing.assert_array_equal(to_uint8(x.cuda(), mode), to_uint8(x, mode))
