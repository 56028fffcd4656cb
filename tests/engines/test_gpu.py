"""Parity of every engine on the device, by the rule of `sda-fast bench`: float32 within 1e-4, half precision within 1.5
times the error of plain autocast."""

import pytest
import torch

from sda_fast.bench import bench_step, random_model
from sda_fast.models import ADM, DiT

ADM_SMALL = {
    "image_size": 32,
    "model_channels": 64,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "num_head_channels": 64,
}
DIT_SMALL = {"input_size": 16, "hidden_size": 128, "depth": 2, "num_heads": 2, "num_classes": 10}
MODELS = {"adm": (ADM, ADM_SMALL), "dit": (DiT, DIT_SMALL)}
ENGINES = {
    "eager": ("eager", {}),
    "inductor": ("inductor", {"cuda_graphs": False}),
    "inductor, CUDA graphs": ("inductor", {"cuda_graphs": True}),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", MODELS)
def test_parity_on_the_device(model, engine, precision):
    name, options = ENGINES[engine]
    settings = {"engine": name, "options": options, "precision": precision, "batch": 3}
    row = bench_step(random_model(*MODELS[model]), model, **settings, device="cuda", repeats=1)
    assert "failed" not in row, row["failed"]
    assert row["seconds_per_image"] > 0
