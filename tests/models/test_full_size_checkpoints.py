"""The published diffusion models' files at full size: every key of the real formats, in half precision on disk."""

import pytest
import torch

from sda_fast.errors import SdaError
from sda_fast.models import ADM, DiT, load_adm, load_dit
from sda_fast.models.presets import ADM_PRESETS, DIT_PRESETS

pytestmark = pytest.mark.slow


def write(kind, config, path, **wrapper):
    """A .pt file of the model's keys and shapes; each tensor holds a number of its own, exact in bfloat16."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in kind(**config).state_dict().items()}
    numbers = {name: (1 + i % 128) * 2.0 ** -(i // 128) for i, name in enumerate(sorted(shapes))}
    state = {name: torch.full(shape, numbers[name], dtype=torch.bfloat16) for name, shape in shapes.items()}
    torch.save({"ema": state, **wrapper} if wrapper else state, path)
    return numbers


def holds(model, numbers):
    state = model.state_dict()
    return state.keys() == numbers.keys() and all(
        t.dtype == torch.float32 and (t.min(), t.max()) == (numbers[name], numbers[name]) for name, t in state.items()
    )


def test_adm_256(tmp_path):
    path = tmp_path / "256x256_diffusion_uncond.pt"
    numbers = write(ADM, ADM_PRESETS["imagenet256"], path)
    assert len(numbers) == 566  # as many as the published file
    model = load_adm(path, "imagenet256")
    assert holds(model, numbers)
    assert sum(p.numel() for p in model.parameters()) == 552_814_086
    del model
    with pytest.raises(SdaError, match=r"it looks like an ADM\): name a preset, imagenet256 fits"):
        load_adm(path)
    with pytest.raises(SdaError, match=r"is not this ADM \(label_emb\.weight is missing; 1 missing, 0 foreign, 0 of"):
        load_adm(path, "imagenet256_cond")
    path.unlink()


def test_dit_xl_2(tmp_path):
    path = tmp_path / "DiT-XL-2-256x256.pt"
    numbers = write(DiT, DIT_PRESETS["dit-xl-2"], path, opt={"state": {}}, steps=400_000)
    model = load_dit(path, "dit-xl-2")
    assert holds(model, numbers)
    del model
    with pytest.raises(SdaError, match=r"it looks like a DiT\): name a preset, dit-xl-2 fits"):
        load_dit(path)
    with pytest.raises(
        SdaError, match=r"\(pos_embed has shape \[1, 256, 1152\] instead of \[1, 1024, 1152\]; 0 missing"
    ):
        load_dit(path, "dit-xl-2-512")
    path.unlink()
