"""The two published recipes against values written down from the paper's table 7 and the published configuration."""

import math
import random

import numpy as np
import pytest
import timm
import torch

from sda_fast.errors import SdaError
from sda_fast.models.classifiers import create_classifier, with_drop_path
from sda_fast.stages.augment import crop_flip, randaugment
from sda_fast.stages.optimization import learning_rate, make_optimizer, part_loss
from sda_fast.stages.recipes import DROP_PATH, RECIPES, recipe_for

STEPS_PER_EPOCH = 49  # 50,000 images in batches of 1024, the last one short


@pytest.mark.parametrize(
    ("recipe", "epochs", "rates"),
    [
        # Table 7: SGD 5e-4, step decay at epoch 10. By epoch, the rate of all its steps.
        ("paper-resnet", 15, {0: 5e-4, 9: 5e-4, 10: 5e-5, 14: 5e-5}),
        # The code: a tenth at 10, 20 and 25.
        ("code-resnet", 30, {0: 5e-4, 9: 5e-4, 10: 5e-5, 19: 5e-5, 20: 5e-6, 24: 5e-6, 25: 5e-7, 29: 5e-7}),
        # From the end of the warm-up by epoch: 2e-7 + (2e-5 - 2e-7) (1 + cos(pi k / T)) / 2 with T = 10 ...
        ("paper-transformer", 15, {5: 2e-5, 6: 1.9515460e-5, 10: 1.01e-5, 14: 6.8454049e-7}),
        # ... and T = 25; at epoch 15 the rate is still 1.3e-5.
        ("code-transformer", 30, {5: 2e-5, 15: 1.3159268e-5, 17: 1.0721626e-5, 29: 2.7806446e-7}),
    ],
)
def test_rates_by_epoch(recipe, epochs, rates):
    assert RECIPES[recipe].epochs == epochs
    for epoch, rate in rates.items():
        for step in (epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH - 1):
            assert learning_rate(RECIPES[recipe], step, STEPS_PER_EPOCH) == pytest.approx(rate, rel=1e-6)


@pytest.mark.parametrize("recipe", ["paper-transformer", "code-transformer"])
def test_warm_up_by_step(recipe):
    """245 steps, linear from 2e-8 times 2e-5 in the first to 2e-5 in the last."""
    for step, rate in {0: 4e-13, 1: 8.196760e-8, 61: 5.0000003e-6, 122: 1.0e-5, 244: 2e-5, 245: 2e-5}.items():
        assert learning_rate(RECIPES[recipe], step, STEPS_PER_EPOCH) == pytest.approx(rate, rel=1e-6)


def test_rates_of_the_testbed():
    """15 epochs of, here, 10 steps: warm-up over the first, cosine per epoch to a hundredth."""
    for step, rate in {0: 1e-12, 1: 1e-5, 9: 9e-5, 10: 1e-4, 79: 6.15148e-5, 80: 5.05e-5, 149: 2.24107e-6}.items():
        assert learning_rate(RECIPES["photos"], step, 10) == pytest.approx(rate, rel=1e-4)


@pytest.mark.parametrize("name", ["paper-resnet", "code-resnet"])
def test_resnet_takes_sgd_and_decays_everything(name):
    recipe = RECIPES[name]
    assert (recipe.batch_size, recipe.micro_batch, recipe.parts) == (512, 64, 8)
    assert (recipe.clip_norm, recipe.label_smoothing, recipe.drop_path) == (None, 0.0, None)
    model = timm.create_model("resnet18")
    optimizer = make_optimizer(model, recipe)
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (5e-4, 0.9, 1e-4, False)
    assert len(group["params"]) == len(list(model.parameters()))


PLAIN = {  # what is not decayed: norms, biases, layer scales, position tables
    "swin_tiny_patch4_window7_224": ("bias", "norm.weight", "norm1.weight", "norm2.weight", "position_bias_table"),
    "convnext_atto": ("bias", "norm.weight", "gamma", "stem.1.weight", "downsample.0.weight"),
}


@pytest.mark.parametrize("name", ["paper-transformer", "code-transformer"])
@pytest.mark.parametrize("architecture", PLAIN)
def test_transformers_take_adamw_and_decay_matrices_and_kernels(name, architecture):
    recipe = RECIPES[name]
    assert (recipe.batch_size, recipe.micro_batch, recipe.parts) == (1024, 128, 8)
    assert (recipe.clip_norm, recipe.label_smoothing) == (5.0, 0.1)
    with torch.device("meta"):
        model = timm.create_model(architecture)
    optimizer = make_optimizer(model, recipe)
    assert isinstance(optimizer, torch.optim.AdamW)
    decay = {}
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (2e-5, (0.9, 0.999), 1e-8)
        decay |= {id(parameter): group["weight_decay"] for parameter in group["params"]}
    found = {parameter: decay[id(tensor)] for parameter, tensor in model.named_parameters()}
    assert found == {parameter: 0.0 if parameter.endswith(PLAIN[architecture]) else 1e-8 for parameter in found}
    assert len(set(found.values())) == 2


def test_the_loss_by_hand():
    """Two classes, logits (1, 0): -log p is log(1 + 1/e) = 0.313262 for the first and 1.313262 for the second."""
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    labels = torch.tensor([0, 1])
    assert part_loss(logits, labels, RECIPES["code-resnet"]).item() == pytest.approx(0.813262, abs=1e-6)
    # Smoothed by 0.1 the label is worth 0.95 and the other class 0.05.
    first = part_loss(logits[:1], labels[:1], RECIPES["code-transformer"]).item()
    assert first == pytest.approx(0.95 * 0.313262 + 0.05 * 1.313262, abs=1e-6)


def test_augmentations_of_the_transformers():
    _, chain, _ = randaugment(224).transforms
    crop, mirror, augment, _, normalise, erase = chain.transforms
    assert (crop.size, crop.scale, crop.ratio) == ((224, 224), (0.08, 1.0), (3 / 4, 4 / 3))
    assert str(crop.interpolation).lower().endswith("bicubic")
    assert mirror.p == 0.5
    assert augment.num_layers == 2
    assert augment.choice_weights is None
    assert [op.name for op in augment.ops] == [  # mmpretrain's timm_increasing
        *("AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd"),
        *("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing"),
        *("ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
    ]
    for op in augment.ops:
        assert (op.magnitude, op.magnitude_std, op.magnitude_max, op.prob) == (9, 0.5, None, 0.5)
        assert op.kwargs["fillcolor"] == (124, 116, 104)
    assert normalise.mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert normalise.std.tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert (erase.probability, erase.per_pixel, erase.min_area, erase.max_area) == (0.25, True, 0.02, 1 / 3)
    assert erase.log_aspect_ratio == pytest.approx((math.log(3 / 10), math.log(10 / 3)))


def test_augmentations_of_the_resnet():
    _, crop, mirror, _ = crop_flip(224).transforms
    assert (crop.size, crop.scale, crop.ratio) == ((224, 224), (0.08, 1.0), (3 / 4, 4 / 3))
    assert mirror.p == 0.5


def test_the_resnet_sees_what_opencv_resizes():
    cv2 = pytest.importorskip("cv2", reason="needs pip install opencv-python-headless")
    image = np.random.default_rng(0).integers(256, size=(256, 256, 3), dtype=np.uint8)
    transform = crop_flip(224)
    torch.manual_seed(0)
    seen = transform(image).numpy()
    torch.manual_seed(0)
    top, left, height, width = transform.transforms[1].get_params(torch.zeros(3, 256, 256), (0.08, 1.0), (3 / 4, 4 / 3))
    expected = cv2.resize(image[top : top + height, left : left + width], (224, 224), interpolation=cv2.INTER_LINEAR)
    if torch.rand(1) < 0.5:
        expected = expected[:, ::-1]
    difference = np.abs(seen.astype(int) - expected)
    assert difference.max() <= 1
    assert difference.mean() < 0.5


def test_erasing_noise_is_imagenets():
    """Where it erases: mean and deviation of ImageNet's pixels, cut to levels."""
    erase = randaugment(224).transforms[1].transforms[-1]
    back = randaugment(224).transforms[2]
    erase.probability = 1.0
    random.seed(1)
    torch.manual_seed(1)
    x = erase(torch.full((3, 224, 224), 7.0))
    erased = (x != 7.0).all(0)
    levels = back(x)[erased].double()
    assert 0.01 < erased.double().mean() < 0.35
    assert levels.mean(0).tolist() == pytest.approx([123.7, 116.3, 103.5], abs=3)
    assert levels.std(0).tolist() == pytest.approx([58.4, 57.1, 57.4], abs=4)


def test_recipes_by_name_and_architecture():
    assert recipe_for(None, "resnet50") == recipe_for("paper", "resnext50_32x4d") == RECIPES["paper-resnet"]
    assert recipe_for("code", "resnet50.tv_in1k") == RECIPES["code-resnet"]
    assert recipe_for("paper", "vit_base_patch16_224") == RECIPES["paper-transformer"]
    assert recipe_for("code-transformer", "resnet50") == RECIPES["code-transformer"]
    assert recipe_for("photos", "convnext_tiny") == RECIPES["photos"]
    with pytest.raises(SdaError, match="recipe 'resnet50' is not known; choose from paper, code, code-resnet, "):
        recipe_for("resnet50", "resnet50")


@pytest.mark.parametrize(
    ("architecture", "rate"),
    [
        ("swin_tiny_patch4_window7_224", 0.2),
        ("swin_base_patch4_window7_224", 0.2),
        ("convnext_tiny.fb_in1k", 0.1),
        ("convnext_base", 0.5),
        ("vit_base_patch16_224", None),
    ],
)
def test_stochastic_depth_as_published_or_as_told(architecture, rate):
    for name in ("paper", "code"):
        assert recipe_for(name, architecture).drop_path == rate
        assert recipe_for(name, architecture, drop_path=0.3).drop_path == 0.3
        assert recipe_for(name, architecture, drop_path=0.0).drop_path == 0.0
    assert set(DROP_PATH.values()) == {0.1, 0.2, 0.5}


def test_part_of_a_recipe():
    recipe = recipe_for("code", "convnext_tiny", micro_batch=100, stop_after=15)
    assert (recipe.parts, recipe.last_epoch, recipe.epochs) == (11, 15, 30)
    for changes, message in (
        ({"drop_path": 1.0}, "--drop-path 1.0 is out of range"),
        ({"drop_path": -0.1}, "--drop-path -0.1 is out of range"),
        ({"micro_batch": 1}, "--micro-batch 1 is out of range"),
        ({"stop_after": 0}, "--stop-after 0 is out of range: the recipe has 30 epochs"),
    ):
        with pytest.raises(SdaError, match=message):
            recipe_for("code", "resnet50", **changes)


def test_rates_of_the_blocks_rise_to_the_one_given():
    options = {"depths": [1, 1, 2, 1], "dims": [8, 8, 16, 16], "patch_size": 1}
    model = create_classifier("convnext_atto", ["ant", "bee"], options, input_size=16).eval()
    dropping = with_drop_path(model, 0.4)
    rates = [m.drop_prob for m in dropping.modules() if isinstance(m, timm.layers.DropPath)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4])  # the first block's is 0
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(dropping(x), model(x))


def test_a_model_that_knows_no_stochastic_depth():
    with pytest.raises(SdaError, match=r"timm's dla46_c does not take these options: .*drop_path_rate"):
        with_drop_path(create_classifier("dla46_c", ["ant", "bee"]), 0.1)
