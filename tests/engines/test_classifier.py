"""A classifier on an engine: its logits, whatever the batch; and how `evaluate` takes it."""

import json

import pytest
import torch

from sda_fast.engines.classifier import EngineClassifier
from sda_fast.errors import SdaError
from sda_fast.methods import METHODS, create, create_from, method_class
from sda_fast.models import load_classifier
from sda_fast.stages import evaluate as stage
from sda_fast.stages.evaluate import evaluate

IMAGES = torch.rand(7, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("engine", ["eager", "onnx"])
@pytest.mark.parametrize("kind", ["resnet", "convnext"])
def test_logits_of_any_number_of_images(tiny, engine, kind):
    model = load_classifier(getattr(tiny, kind))
    quick = EngineClassifier(model, 16, engine, "fp32", 3)
    with torch.no_grad():
        expected = model(IMAGES)
        for count in (1, 3, 7):
            torch.testing.assert_close(quick(IMAGES[:count]), expected[:count], rtol=1e-5, atol=1e-5)


def test_half_precision(tiny):
    model = load_classifier(tiny.resnet)
    with torch.no_grad():
        expected, logits = model(IMAGES), EngineClassifier(model, 16, "eager", "bf16", 4)(IMAGES)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, expected)
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)
    assert next(model.parameters()).dtype == torch.float32


def test_wrong_engines_and_precisions(tiny):
    model = load_classifier(tiny.resnet)
    with pytest.raises(SdaError, match="engine 'none' is not known"):
        EngineClassifier(model, 16, "none", "fp32", 4)
    with pytest.raises(SdaError, match="precision 'fp8' is not known"):
        EngineClassifier(model, 16, "eager", "fp8", 4)
    with pytest.raises(SdaError, match="the trt engine"):  # TensorRT is missing, or the GPU is
        EngineClassifier(model, 16, "trt", "fp32", 4).check("cpu")


def test_evaluate_runs_on_the_engine_and_adapts_the_module(tmp_path, tiny, write_images, monkeypatch):
    names = [f"{tiny.classes[i % 2]}/{i}.png" for i in range(5)]
    images = write_images(tmp_path / "images", names, size=(16, 16))
    made, called = [], []

    class Spy(EngineClassifier):
        def forward(self, images):
            called.append(len(images))
            return super().forward(images)

    monkeypatch.setattr(stage, "EngineClassifier", Spy)

    def spied(name, model, *given):
        made.append((name, type(model)))
        return create_from(name, model, *given)

    monkeypatch.setattr(stage, "create_from", spied)
    options = dict(methods=["source", "tent"], batch_size=4)
    plain = evaluate(images, tmp_path / "plain", tiny.resnet, **options)
    assert [kind.__name__ for _, kind in made] == ["Classifier", "Classifier"]
    assert not called
    made.clear()
    rows = evaluate(images, tmp_path / "onnx", tiny.resnet, **options, engine="onnx")
    assert [(name, kind.__name__) for name, kind in made] == [("source", "Spy"), ("tent", "Classifier")]
    assert called == [4, 1]
    assert rows == plain
    settings = json.loads((tmp_path / "onnx" / "manifest.json").read_text())["settings"]
    assert (settings["engine"], settings["precision"]) == ("onnx", "fp32")
    with pytest.raises(SdaError, match='was made with engine = "onnx"'):
        evaluate(images, tmp_path / "onnx", tiny.resnet, **options)


def test_methods_that_go_back_through_the_classifier_say_so(tiny):
    """Those whose cost counts passes back, and no others."""
    model = load_classifier(tiny.resnet)
    assert {name for name in METHODS if method_class(name).differentiates} == {"tent", "memo", "diffusion_tta", "gda"}
    for name in ("source", "tent", "memo"):
        assert bool(create(name, model).cost().classifier_backward) == method_class(name).differentiates
