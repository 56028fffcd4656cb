"""Every engine on the device: parity by the rule of `sda-fast bench`, float32 within 1e-4 and half precision within 1.5
times the error of plain autocast; and the same bits again."""

import os

import pytest
import torch
from torch._inductor.utils import fresh_cache

from sda_fast.bench import bench_step, random_model
from sda_fast.diffusion import LowPass
from sda_fast.engines import GuidedStep, create_engine
from sda_fast.models import ADM, DiT
from sda_fast.numerics import CUBLAS, CUBLAS_CHOICES

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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.skipif(os.environ.get(CUBLAS) not in CUBLAS_CHOICES, reason=f"needs {CUBLAS}, which make gpu sets")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_guided_step_has_the_same_bits_again(engine, precision):
    """Attention has 1,024 tokens: its gradient is added up from several blocks."""
    name, options = ENGINES[engine]
    adm = random_model(ADM, {**ADM_SMALL, "image_size": 64}).cuda()
    step = GuidedStep(adm, LowPass(64, 4), precision)
    inputs = step.example(8)
    program = create_engine(name, **options).prepare(step, inputs)
    first = [output.clone() for output in program.run(*inputs)]
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(program.run(*inputs), first, strict=True))
    torch.compiler.reset()
    with fresh_cache():  # as another process would compile it
        again = create_engine(name, **options).prepare(step, inputs)
        assert all(torch.equal(a, b) for a, b in zip(again.run(*inputs), first, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_float32_is_float32_whatever_the_process_allows(monkeypatch):
    step = GuidedStep(random_model(ADM, ADM_SMALL).cuda(), LowPass(32, 4))
    inputs = step.example(2)
    program = create_engine("eager").prepare(step, inputs)
    results = []
    for allowed in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        results.append([output.clone() for output in program.run(*inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
