"""Steps as written and as traced graphs: the originals' numbers, the plain reference with autograd, half precision."""

import pytest
import torch
from torch import nn

from sda_fast.diffusion import LowPass, Schedule
from sda_fast.diffusion.guidance import Guided, finish
from sda_fast.diffusion.samplers import ReverseSteps, q_sample
from sda_fast.engines import ClassifierStep, DiTStep, GuidedStep, UnguidedStep
from sda_fast.engines.eager import EagerEngine
from sda_fast.engines.graph import trace
from sda_fast.errors import SdaError
from sda_fast.models import ADM, DiT, load_adm, load_classifier
from sda_fast.reference import UNet, linear_schedule, low_pass
from sda_fast.reference.diffusion import p_mean_variance
from sda_fast.weights import weights_path

SETTINGS = {  # changes of the tiny ADM
    "scale-shift": {},
    "no scale-shift, strided convolutions, new order": {
        "use_scale_shift_norm": False,
        "resblock_updown": False,
        "use_new_attention_order": True,
        "out_channels": 3,
    },
    "mean pooling": {"resblock_updown": False, "conv_resample": False},
    "class-conditional": {"num_classes": 5},
}
INDEX, FACTOR, RESPACING = 20, 4, "100"


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(value, expected):
    return float((value - expected).norm() / expected.norm())


def eagerly(step, *inputs):
    return EagerEngine().prepare(step, inputs).run(*inputs)


def native(step, *inputs):
    return trace(step, inputs)(*inputs)


def channels_last(step, x, *rest):
    x = x.contiguous(memory_format=torch.channels_last)
    return trace(step, (x, *rest), channels_last=True)(x, *rest)


def portable(step, *inputs):
    return trace(step, inputs, "portable")(*inputs)


GRAPHS = pytest.mark.parametrize("run", [native, portable])


@pytest.fixture(scope="module")
def original(load_reference, load_weights):
    """original(name): the model of a reference file, its tensors and its configuration."""

    def load(name, kind=ADM):
        tensors, meta = load_reference(name)
        model = kind(**meta["config"]).eval()
        model.load_state_dict(load_weights(tensors))
        return model, tensors, meta

    return load


@pytest.mark.parametrize("name", ["adm_tiny", "adm_class_cond", "adm_plain_updown"])
@GRAPHS
def test_the_unguided_step_is_the_original_network(original, name, run):
    adm, tensors, _ = original(name)
    with torch.no_grad():
        conditioning = adm.conditioning(tensors["timesteps"], tensors.get("y"))
    (out,) = run(UnguidedStep(adm), tensors["x"], conditioning)
    assert relative(out, tensors["output"]) <= 1e-4


def plain(unet, x, y, reference, autocast=None):
    """The network's output, and the gradient of each image's own ||phi(reference) - phi(x_0)|| for x, by autograd."""
    schedule, variance = linear_schedule(RESPACING), "learned_range" if unet.out[2].out_channels == 6 else "fixed_large"
    outputs = []

    def network(x, timesteps):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            outputs.append(unet(x, timesteps, y) if y is not None else unet(x, timesteps))
        return outputs[-1].float()

    x = x.clone().requires_grad_()
    index = torch.full((len(x),), INDEX)
    _, _, x0 = p_mean_variance(schedule, network, x, index, clip=True, variance=variance)
    norms = (low_pass(reference, FACTOR) - low_pass(x0, FACTOR)).flatten(1).norm(dim=1)
    return outputs[0].detach().float(), *torch.autograd.grad(norms.sum(), x)


def guided_inputs(adm, lowpass, x, y, reference):
    steps = ReverseSteps(Schedule.linear(RESPACING), INDEX + 1)
    with torch.no_grad():
        timesteps = torch.tensor([steps._timestep_map[INDEX]])
        conditioning = adm.conditioning(timesteps if y is None else timesteps.expand(len(x)), y)
    return x, conditioning, steps.table[INDEX : INDEX + 1], lowpass.down(reference)


def gradient(coefficients, terms):
    """That of ||phi(reference) - phi(x_0)|| for x_t, from what a guided step returns: x_0 = a x - b eps."""
    a, b = coefficients[0, :2]
    return (b * terms.through_network - a * terms.cotangent) / terms.squares.sqrt()[:, None, None, None]


@pytest.fixture(scope="module", params=SETTINGS, ids=str)
def varied(request, tiny):
    """(ADM, the reference's network with the same weights, labels) of one kind of ADM."""
    changes = SETTINGS[request.param]
    adm = load_adm(tiny.save("adm", f"steps_{list(SETTINGS).index(request.param)}", seed=7, **changes))
    unet = UNet(**adm.config).eval()
    unet.load_state_dict(adm.state_dict())
    return adm, unet, torch.tensor([0, 4, 2]) if adm.num_classes else None


@pytest.mark.parametrize("run", [channels_last, portable])
def test_output_and_gradient_are_those_of_autograd_through_the_reference(varied, run):
    adm, unet, y = varied
    lowpass, reference = LowPass(16, FACTOR), draw(3, 3, 16, 16).clamp(-1, 1)
    x = q_sample(Schedule.linear(RESPACING), INDEX, reference, draw(3, 3, 16, 16, seed=1))
    inputs = guided_inputs(adm, lowpass, x, y, reference)
    terms = Guided(*run(GuidedStep(adm, lowpass), *inputs))
    expected_out, expected_gradient = plain(unet, x, y, reference)
    errors = {
        "output": relative(terms.out, expected_out),
        "gradient": relative(gradient(inputs[2], terms), expected_gradient),
    }
    assert max(errors.values()) <= 1e-4, errors
    assert terms.through_network.norm() > 0.01 * terms.cotangent.norm()  # the network's part counts


def half_errors(adm, unet, images, precision, run):
    """Errors against float32 of the output and the gradient: of the step, and of plain autocast."""
    size = images.shape[-1]
    lowpass = LowPass(size, FACTOR)
    x = q_sample(Schedule.linear(RESPACING), INDEX, images, draw(*images.shape, seed=1))
    inputs = guided_inputs(adm, lowpass, x, None, images)
    exact = plain(unet, x, None, images)
    terms = Guided(*run(GuidedStep(adm, lowpass, precision), *inputs))
    assert all(t.dtype == torch.float32 for t in terms)
    ours = terms.out, gradient(inputs[2], terms)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    theirs = plain(unet, x, None, images, autocast=dtype)
    return [[relative(a, b) for a, b in zip(values, exact, strict=True)] for values in (ours, theirs)]


@pytest.fixture(scope="module")
def trained():
    """The ADM of the testbed, trained, and the reference's network with its weights."""
    adm = load_adm(weights_path("photos:adm"))
    unet = UNet(**adm.config).eval()
    unet.load_state_dict(adm.state_dict())
    return adm, unet


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("run", [eagerly, portable])
def test_half_precision_errs_no_more_than_plain_autocast(trained, precision, run):
    smooth = torch.nn.functional.interpolate(draw(4, 3, 6, 6, seed=5), (32, 32), mode="bicubic").clamp(-1, 1)
    ours, autocast = half_errors(*trained, smooth, precision, run)
    print(f"{precision} {run.__name__}: output and gradient err by {ours}, autocast {autocast}")
    for error, plainly in zip(ours, autocast, strict=True):
        assert 0 < error <= 1.5 * plainly


def test_in_half_precision_the_ends_of_the_network_stay_float32(trained):
    adm, _ = trained
    step = GuidedStep(adm, LowPass(32, 4), "bf16")
    dtypes = {name: p.dtype for name, p in step.adm.named_parameters()}
    single = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert {name for name in dtypes if name.startswith(("time_embed.", "out."))} <= single
    assert all(name in single for name in dtypes if "emb_layers" in name)
    norms = {f"{n}.weight" for n, m in step.adm.named_modules() if isinstance(m, nn.GroupNorm)}
    assert norms <= single
    assert dtypes["input_blocks.0.0.weight"] == torch.bfloat16
    assert next(adm.parameters()).dtype == torch.float32  # the model given is left alone
    assert step.adm is not adm


@pytest.mark.parametrize(("name", "norm_group", "run"), [("dda_batch2", 2, native), ("dda_batch1", 1, portable)])
def test_single_steps_of_a_graph_follow_the_original(original, load_reference, name, norm_group, run):
    """Three steps of one graph: early, in the middle, and the last, whose noise counts for nothing."""
    adm, _, _ = original("adm_tiny")
    tensors, meta = load_reference(name)
    schedule, lowpass = Schedule.linear(meta["respacing"]), LowPass(adm.image_size, meta["factor"])
    down, graph = lowpass.down(tensors["reference"]), None
    steps = ReverseSteps(schedule, meta["start_step"])
    for k, position in enumerate(steps, 1):
        if k not in (2, 25, 50):
            continue
        x = tensors["samples"][k - 2]
        with torch.no_grad():
            conditioning = adm.conditioning(schedule.timestep_map[position[:1]])
        inputs = x, conditioning, steps.table[position[:1]], down
        graph = graph or trace(GuidedStep(adm, lowpass), inputs, run.__name__)
        terms = Guided(*graph(*inputs))
        noise = {"noise": tensors["noise"][k].float()}
        ours = finish(x, terms, steps, position, noise, meta["scale"], "batch", norm_group)
        assert relative(ours, tensors["samples"][k - 1]) <= 1e-4


@GRAPHS
def test_dit_steps_are_the_original(original, run):
    dit, tensors, meta = original("dit_tiny", DiT)
    x, timesteps, y, scale = tensors["x"], tensors["timesteps"], tensors["y"], meta["cfg_scale"]
    null = torch.full_like(y, dit.num_classes)
    with torch.no_grad():
        conditioning = dit.conditioning(timesteps, y)
        doubled = dit.conditioning(timesteps.repeat(2), torch.cat([y, null]))
        expected = dit.forward_with_cfg(torch.cat([x, x]), timesteps.repeat(2), torch.cat([y, null]), scale)
    (out,) = run(DiTStep(dit), x, conditioning)
    assert relative(out, tensors["output"]) <= 1e-4
    (guided,) = run(DiTStep(dit, scale), x, doubled.view(2, len(x), -1))
    assert guided.shape == x.shape[:1] + tensors["output"].shape[1:]
    assert relative(guided, tensors["cfg_output"][: len(x)]) <= 1e-4
    assert relative(guided, expected[: len(x)]) <= 1e-5


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_dit_in_half_precision_errs_no_more_than_plain_autocast(original, precision):
    dit, tensors, _ = original("dit_tiny", DiT)
    inputs = tensors["x"], tensors["timesteps"], tensors["y"]
    step = DiTStep(dit, precision=precision)
    with torch.no_grad():
        exact = dit(*inputs)
        with torch.autocast("cpu", step.dit.blocks[0].attn.qkv.weight.dtype):
            plainly = relative(dit(*inputs).float(), exact)
        (out,) = eagerly(step, tensors["x"], dit.conditioning(*inputs[1:]))
    assert out.dtype == torch.float32
    assert 0 < relative(out, exact) <= 1.5 * plainly


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_deep_dit_in_half_precision_errs_no_more_than_plain_autocast(precision):
    """As deep as DiT-XL/2: what is rounded once a block shows."""
    torch.manual_seed(0)
    dit = DiT(input_size=8, patch_size=2, in_channels=4, hidden_size=64, depth=28, num_heads=4, num_classes=10)
    for parameter in dit.eval().requires_grad_(False).parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    inputs = draw(2, 4, 8, 8), torch.tensor([500, 80]), torch.tensor([1, 2])
    step = DiTStep(dit, precision=precision)
    exact = dit(*inputs)
    with torch.autocast("cpu", step.dit.blocks[0].attn.qkv.weight.dtype):
        plainly = relative(dit(*inputs).float(), exact)
    (out,) = eagerly(step, inputs[0], dit.conditioning(*inputs[1:]))
    print(f"{precision}: depth 28 errs by {relative(out, exact):.1e}, autocast by {plainly:.1e}")
    assert 0 < relative(out, exact) <= 1.5 * plainly


@pytest.mark.parametrize("architecture", ["resnet", "convnext"])
@GRAPHS
def test_classifier_steps_are_the_classifier(tiny, architecture, run):
    model = load_classifier(getattr(tiny, architecture))
    step = ClassifierStep(model, 16)
    images = draw(3, 3, 16, 16).clamp(-1, 1)
    (logits,) = run(step, images)
    with torch.no_grad():
        assert relative(logits, model(images)) <= 1e-5


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_classifier_in_half_precision_errs_no_more_than_one_cast_whole(tiny, precision):
    model, images = load_classifier(tiny.resnet), draw(8, 3, 16, 16).clamp(-1, 1)
    step = ClassifierStep(model, 16, precision)
    (logits,) = eagerly(step, images)
    with torch.no_grad():
        exact = model(images)
        half = load_classifier(tiny.resnet).to(step.dtype)
        plainly = relative(half(images.to(step.dtype)).float(), exact)
    assert logits.dtype == torch.float32
    assert 0 < relative(logits, exact) <= 1.5 * plainly


@pytest.mark.parametrize("make", [GuidedStep, UnguidedStep, DiTStep, ClassifierStep])
def test_a_precision_nobody_knows_is_refused(original, tiny, make):
    adm, dit, model = original("adm_tiny")[0], original("dit_tiny", DiT)[0], load_classifier(tiny.resnet)
    lowpass = LowPass(32, 4)
    arguments = {GuidedStep: (adm, lowpass), UnguidedStep: (adm,), DiTStep: (dit, 1.0), ClassifierStep: (model, 16)}
    with pytest.raises(SdaError, match="precision 'fp8' is not known; choose one of fp32, bf16, fp16"):
        make(*arguments[make], "fp8")


@pytest.mark.parametrize("batch", [1, 3])
def test_examples_are_inputs_as_in_use(original, tiny, batch):
    adm, dit = original("adm_tiny")[0], original("dit_tiny", DiT)[0]
    steps = [
        GuidedStep(adm, LowPass(32, 4)),
        UnguidedStep(adm),
        DiTStep(dit),
        DiTStep(dit, 1.5),
        ClassifierStep(load_classifier(tiny.resnet), 16),
    ]
    for step in steps:
        example = step.example(batch)
        assert len(example) == len(step.inputs)
        outputs = eagerly(step, *example)
        assert len(outputs) == len(step.outputs)
        assert all(len(y) == batch and y.isfinite().all() and y.dtype == torch.float32 for y in outputs)
