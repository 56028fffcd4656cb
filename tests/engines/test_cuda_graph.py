"""What a CUDA graph needs besides its recording, which a GPU alone makes."""

import gc
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from sda_fast.engines import ClassifierStep, create_engine
from sda_fast.engines.classifier import EngineClassifier
from sda_fast.engines.cuda_graph import CudaGraph
from sda_fast.models import load_classifier


@pytest.fixture
def no_gpu(monkeypatch):
    """The calls to CUDA's graphs, without CUDA: a replay does nothing."""

    @contextmanager
    def graph(recording, stream, capture_error_mode):
        yield

    fake = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: fake)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", graph)


def test_it_keeps_what_its_addresses_point_to(no_gpu):
    def capture():
        weight = torch.ones(3)
        return CudaGraph(lambda x: (x * weight,), (torch.ones(3),)), weakref.ref(weight)

    graph, weight = capture()
    gc.collect()
    assert weight() is not None
    assert torch.equal(graph.run(torch.ones(3))[0], torch.ones(3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_program_outlives_the_collection_of_garbage(tiny):
    step = ClassifierStep(load_classifier(tiny.resnet).cuda(), 16)
    inputs = step.example(4)
    program = create_engine("inductor").prepare(step, inputs)
    first = program.run(*inputs)[0].clone()
    gc.collect()
    torch.cuda.empty_cache()
    filled = [torch.full((2**20,), float("nan"), device="cuda") for _ in range(256)]
    assert torch.equal(program.run(*inputs)[0], first)
    del filled


def test_a_classifier_keeps_the_logits_of_earlier_parts(tiny):
    """Programs may return the same tensors at every call."""
    model = load_classifier(tiny.resnet)
    images = torch.rand(7, 3, 16, 16) * 2 - 1
    classifier = EngineClassifier(model, 16, "eager", "fp32", 3)
    run, outputs = classifier._run, torch.empty(3, len(model.classes))

    def overwriting(x):
        return (outputs.copy_(run(x)[0]),)

    classifier._run = overwriting
    with torch.no_grad():
        assert torch.allclose(classifier(images), model(images), atol=1e-5)
