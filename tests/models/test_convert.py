"""Classifiers in mmpretrain's layout against timm's, by output. The modules here are written after mmpretrain's
documented structure (key names, order of the merged patches, index of the relative positions), apart from timm's."""

import argparse
import dataclasses
import itertools
import pickle
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
from timm.data import ImageNetInfo
from torch import nn
from torch.nn import functional as F

from sda_fast.errors import SdaError
from sda_fast.models import load_classifier
from sda_fast.stages.evaluate import evaluate
from sda_fast.stages.finetune import finetune
from sda_fast.stages.recipes import RECIPES

WINDOW = 7


def sequence(*modules):
    return nn.ModuleList(modules)


class Holder(nn.Module):
    """A module that only holds others, by name."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class MMConvNeXtBlock(nn.Module):
    def __init__(self, channels, linear):
        super().__init__()
        self.depthwise_conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        pointwise = nn.Linear if linear else lambda a, b: nn.Conv2d(a, b, 1)
        self.pointwise_conv1 = pointwise(channels, 4 * channels)
        self.pointwise_conv2 = pointwise(4 * channels, channels)
        self.gamma = nn.Parameter(torch.empty(channels))
        self.linear = linear

    def forward(self, x):
        h = self.norm(self.depthwise_conv(x).permute(0, 2, 3, 1))
        h = h if self.linear else h.permute(0, 3, 1, 2)
        h = self.pointwise_conv2(F.gelu(self.pointwise_conv1(h)))
        h = h.permute(0, 3, 1, 2) if self.linear else h
        return x + self.gamma[:, None, None] * h


class MMConvNeXt(nn.Module):
    def __init__(self, channels, depths, linear=True):
        super().__init__()
        downsample = [sequence(nn.Conv2d(3, channels[0], 4, 4), nn.LayerNorm(channels[0], eps=1e-6))]
        for before, after in itertools.pairwise(channels):
            downsample.append(sequence(nn.LayerNorm(before, eps=1e-6), nn.Conv2d(before, after, 2, 2)))
        stages = [
            sequence(*(MMConvNeXtBlock(c, linear) for _ in range(n))) for c, n in zip(channels, depths, strict=True)
        ]
        norm = nn.LayerNorm(channels[-1], eps=1e-6)
        self.backbone = Holder(downsample_layers=sequence(*downsample), stages=sequence(*stages), norm3=norm)
        self.head = Holder(fc=nn.Linear(channels[-1], 1000))

    def forward(self, x):
        def normalised(norm, x):
            return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

        for i, stage in enumerate(self.backbone.stages):
            first, second = self.backbone.downsample_layers[i]
            x = normalised(second, first(x)) if i == 0 else second(normalised(first, x))
            for block in stage:
                x = block(x)
        return self.head.fc(self.backbone.norm3(x.mean((2, 3))))


class MMSwinAttention(nn.Module):
    """Attention in 7x7 windows; `shift` moves the windows, and a mask keeps apart what the roll brings together."""

    def __init__(self, dim, heads, shift):
        super().__init__()
        self.heads, self.shift = heads, shift
        span = 2 * WINDOW - 1
        self.w_msa = Holder(qkv=nn.Linear(dim, 3 * dim), proj=nn.Linear(dim, dim))
        self.w_msa.relative_position_bias_table = nn.Parameter(torch.empty(span**2, heads))
        # index[i, j] = position of i plus position of j counted from the window's end, in a grid of `span` columns
        row, column = torch.meshgrid(torch.arange(WINDOW), torch.arange(WINDOW), indexing="ij")
        place = (row * span + column).flatten()
        self.w_msa.register_buffer("relative_position_index", place[:, None] + place.flip(0)[None])

    def forward(self, x):
        n, height, width, dim = x.shape
        shift = 0 if height == WINDOW else self.shift
        region = torch.zeros(height, width)
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
            edges = [-WINDOW, -shift]
            for axis in (0, 1):
                for edge in edges:
                    region.narrow(axis, height + edge, -edge).add_(3**axis)

        def windows(t, channels):
            t = t.reshape(-1, height // WINDOW, WINDOW, width // WINDOW, WINDOW, channels)
            return t.transpose(2, 3).reshape(-1, WINDOW**2, channels)

        region = windows(region[None, :, :, None], 1)[..., 0]
        mask = torch.where(region[:, None] == region[:, :, None], 0.0, -100.0)  # [windows, 49, 49]
        tokens = windows(x, dim)
        count = len(tokens)
        q, k, v = self.w_msa.qkv(tokens).reshape(count, -1, 3, self.heads, dim // self.heads).unbind(2)
        scores = torch.einsum("wihd,wjhd->whij", q * (dim // self.heads) ** -0.5, k)
        bias = self.w_msa.relative_position_bias_table[self.w_msa.relative_position_index]  # [49, 49, heads]
        scores = scores + bias.permute(2, 0, 1) + mask.repeat(n, 1, 1)[:, None]
        out = self.w_msa.proj(torch.einsum("whij,wjhd->wihd", scores.softmax(-1), v).reshape(count, -1, dim))
        out = out.reshape(n, height // WINDOW, width // WINDOW, WINDOW, WINDOW, dim).transpose(2, 3)
        return out.reshape(n, height, width, dim).roll((shift, shift), (1, 2))


class MMSwinBlock(nn.Module):
    def __init__(self, dim, heads, shift):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = MMSwinAttention(dim, heads, shift)
        self.ffn = Holder(layers=sequence(sequence(nn.Linear(dim, 4 * dim)), nn.Linear(4 * dim, dim)))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        (first,), second = self.ffn.layers
        return x + second(F.gelu(first(self.norm2(x))))


class MMSwin(nn.Module):
    def __init__(self, dim, depths, heads):
        super().__init__()
        stages = []
        for i, (depth, h) in enumerate(zip(depths, heads, strict=True)):
            width = dim * 2**i
            stage = Holder(blocks=sequence(*(MMSwinBlock(width, h, WINDOW // 2 * (j % 2)) for j in range(depth))))
            if i < len(depths) - 1:
                stage.downsample = Holder(
                    norm=nn.LayerNorm(4 * width), reduction=nn.Linear(4 * width, 2 * width, bias=False)
                )
            stages.append(stage)
        embed = Holder(projection=nn.Conv2d(3, dim, 4, 4), norm=nn.LayerNorm(dim))
        features = dim * 2 ** (len(depths) - 1)
        self.backbone = Holder(patch_embed=embed, stages=sequence(*stages), norm3=nn.LayerNorm(features))
        self.head = Holder(fc=nn.Linear(features, 1000))

    def forward(self, x):
        embed = self.backbone.patch_embed
        x = embed.norm(embed.projection(x).permute(0, 2, 3, 1))
        for stage in self.backbone.stages:
            for block in stage.blocks:
                x = block(x)
            if hasattr(stage, "downsample"):
                n, height, width, _ = x.shape
                patches = F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)  # channel, row, column
                x = stage.downsample.reduction(stage.downsample.norm(patches)).reshape(n, height // 2, width // 2, -1)
        return self.head.fc(self.backbone.norm3(x).mean((1, 2)))


class MMBottleneck(nn.Module):
    def __init__(self, before, width, stride):
        super().__init__()
        after = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, after, 1, bias=False), nn.BatchNorm2d(after)
        self.downsample = None
        if stride != 1 or before != after:
            self.downsample = sequence(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(h)))))
        if self.downsample is not None:
            x = self.downsample[1](self.downsample[0](x))
        return F.relu(x + h)


class MMResNet(nn.Module):
    def __init__(self, depths):
        super().__init__()
        self.backbone = Holder(conv1=nn.Conv2d(3, 64, 7, 2, 3, bias=False), bn1=nn.BatchNorm2d(64))
        before = 64
        for i, depth in enumerate(depths):
            width = 64 * 2**i
            blocks = []
            for j in range(depth):
                blocks.append(MMBottleneck(before, width, 2 if i and not j else 1))
                before = 4 * width
            self.backbone.add_module(f"layer{i + 1}", sequence(*blocks))
        self.head = Holder(fc=nn.Linear(2048, 1000))

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.backbone.bn1(self.backbone.conv1(x))), 3, 2, 1)
        for i in (1, 2, 3, 4):
            for block in getattr(self.backbone, f"layer{i}"):
                x = block(x)
        return self.head.fc(x.mean((2, 3)))


MODELS = {
    "resnet50": lambda: MMResNet((3, 4, 6, 3)),
    "swin_tiny_patch4_window7_224": lambda: MMSwin(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_base_patch4_window7_224": lambda: MMSwin(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "convnext_tiny": lambda: MMConvNeXt((96, 192, 384, 768), (3, 3, 9, 3)),
    "convnext_base": lambda: MMConvNeXt((128, 256, 512, 1024), (3, 3, 27, 3)),
    "convnext_tiny, convolutions": lambda: MMConvNeXt((96, 192, 384, 768), (3, 3, 9, 3), linear=False),
}


def randomised(model):
    """Weights that keep activations near one and make every tensor of the state dict count."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1 and "table" not in name:
            tensor.copy_(noise / tensor[0].numel() ** 0.5)
        elif name.endswith(("running_var", "norm.weight", "norm1.weight", "norm2.weight", "norm3.weight")):
            tensor.copy_(1 + noise.clamp(-2, 2) / 5)
        else:  # biases, the scales of BatchNorm and of layers, running means, position biases
            tensor.copy_(0.3 + noise / 5)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_converted_classifiers_give_the_source_models_outputs(name, tmp_path):
    source, images = randomised(MODELS[name]()), torch.rand(2, 3, 224, 224)
    torch.save({"state_dict": source.state_dict(), "meta": {"epoch": 300, "CLASSES": ["tench"]}}, tmp_path / "mm.pth")
    classifier = load_classifier(tmp_path / "mm.pth")
    assert classifier.config["architecture"] == name.split(",")[0]
    # mmpretrain's data preprocessor, on levels 0 to 255
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    with torch.no_grad():
        expected = source((255 * images - mean[:, None, None]) / std[:, None, None])
        actual = classifier(2 * images - 1)
    assert 1 < expected.abs().max() < 10
    assert (actual - expected).abs().max() <= 1e-5


@pytest.fixture(scope="module")
def state():
    """The state dict of a random ResNet-50 in mmpretrain's layout."""
    return randomised(MODELS["resnet50"]()).state_dict()


def test_foreign_classifiers_know_imagenets_classes_and_the_papers_evaluation(state, tmp_path):
    torch.save(state, tmp_path / "mm.pth")
    classifier = load_classifier(tmp_path / "mm.pth")
    assert classifier.classes == tuple(ImageNetInfo().label_names())
    assert classifier.classes[0] == "n01440764"
    assert len(classifier.classes) == 1000
    assert (classifier.input_size, classifier.resize) == (224, 256)
    assert not classifier.training
    assert not any(p.requires_grad for p in classifier.parameters())


def test_timms_own_keys_and_half_precision(state, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=3)
    torch.save(
        {"model": {name: t.half() if t.is_floating_point() else t for name, t in model.state_dict().items()}},
        tmp_path / "resnet18.pth",
    )
    with pytest.raises(SdaError, match=r"resnet18\.pth does not say which timm model .*looks like a ResNet.*resnet50"):
        load_classifier(tmp_path / "resnet18.pth")
    with pytest.raises(SdaError, match=r"resnet18\.pth tells 3 classes apart, ImageNet has 1000"):
        load_classifier(tmp_path / "resnet18.pth", "resnet18")
    with pytest.raises(SdaError, match=r"tells 3 classes apart, 2 are given"):
        load_classifier(tmp_path / "resnet18.pth", "resnet18", ["ant", "bee"])
    classifier = load_classifier(tmp_path / "resnet18.pth", "resnet18", ["ant", "bee", "cow"])
    assert classifier.classes == ("ant", "bee", "cow")
    for name, tensor in model.state_dict().items():
        assert torch.equal(classifier.model.state_dict()[name], tensor.half().to(tensor.dtype))
    # torchvision's ResNets have the same keys
    torch.save(
        {key.removeprefix("backbone.").removeprefix("head."): t for key, t in state.items()}, tmp_path / "tv.pth"
    )
    assert load_classifier(tmp_path / "tv.pth").config["architecture"] == "resnet50"


def test_other_architectures_and_other_heads(state, tmp_path):
    torch.save(state, tmp_path / "mm.pth")
    with pytest.raises(SdaError, match=r"mm\.pth is not a resnet101 of timm \(.*mmpretrain ResNet\).*architecture"):
        load_classifier(tmp_path / "mm.pth", "resnet101")
    with pytest.raises(SdaError, match="timm has no model named 'resnet51'"):
        load_classifier(tmp_path / "mm.pth", "resnet51")
    torch.save({key: t for key, t in state.items() if not key.startswith("head.")}, tmp_path / "backbone.pth")
    with pytest.raises(SdaError, match=r"backbone\.pth does not say which timm model .*an mmpretrain ResNet"):
        load_classifier(tmp_path / "backbone.pth")
    torch.save({key: t for key, t in state.items() if key != "backbone.layer3.5.bn2.bias"}, tmp_path / "short.pth")
    with pytest.raises(SdaError, match=r"short\.pth is not a resnet50 .*layer3\.5\.bn2\.bias is missing; 1 missing"):
        load_classifier(tmp_path / "short.pth")


def test_own_files_need_no_description(tiny):
    with pytest.raises(SdaError, match="says itself what it holds"):
        load_classifier(tiny.resnet, "resnet18")
    with pytest.raises(SdaError, match="says itself what it holds"):
        load_classifier(tiny.resnet, classes=["ant", "bee", "cow"])


def test_stages_take_foreign_classifiers_and_write_files_of_this_package(state, write_images, tmp_path):
    torch.save(state, tmp_path / "mm.pth")
    folder = write_images(tmp_path / "in", ["n01440764/a.png", "n01443537/b.png"], (64, 64))
    recipe = dataclasses.replace(RECIPES["paper-resnet"], batch_size=2, epochs=1)
    finetune(folder, tmp_path / "out", tmp_path / "mm.pth", recipe, quiet=True)
    before, after = load_classifier(tmp_path / "mm.pth"), load_classifier(tmp_path / "out" / "model.safetensors")
    assert (after.config, after.resize) == (before.config, 256)
    assert not torch.equal(after.model.fc.bias, before.model.fc.bias)
    rows = evaluate(folder, tmp_path / "scores", tmp_path / "mm.pth", methods=["source"], quiet=True)
    assert [(row["model"], row["images"]) for row in rows] == [("mm", 2)]


class HistoryBuffer:
    """As mmengine pickles its logs: arrays, and methods by `getattr`."""

    def __init__(self):
        self._log_history = np.arange(3.0)

    def min(self):
        return self._log_history.min()

    def __getstate__(self):
        return {**self.__dict__, "statistics_methods": {"min": HistoryBuffer.min}}


@pytest.fixture
def mmengine(monkeypatch):
    """HistoryBuffer under the name it has in mmengine's checkpoints."""
    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer
    monkeypatch.setattr(HistoryBuffer, "__module__", module.__name__)
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_training_checkpoints_hold_more_than_weights(state, mmengine, tmp_path):
    training = {
        "meta": {"seed": np.int64(3), "lr": np.float32(0.1), "curve": np.ones(2), "cfg": "model = dict()", "epoch": 15},
        "state_dict": OrderedDict(state),
        "message_hub": {"log_scalars": OrderedDict(loss=HistoryBuffer())},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999)}]},
        "args": argparse.Namespace(model="DiT-XL/2"),
    }
    torch.save(training, tmp_path / "epoch_15.pth")
    classifier = load_classifier(tmp_path / "epoch_15.pth")
    assert torch.equal(classifier.model.fc.weight, state["head.fc.weight"])


def test_what_is_not_known_to_be_harmless_is_refused(state, tmp_path):
    torch.save({"state_dict": state, "meta": pickle.PickleError()}, tmp_path / "more.pth")
    with pytest.raises(SdaError, match=r"more\.pth .*holds more than tensors \(.*PickleError.*docs/checkpoints\.md"):
        load_classifier(tmp_path / "more.pth")
