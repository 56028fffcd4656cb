"""Every engine that needs no GPU: the originals' steps, eager's projections, independence of company, wrong use."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from engines import configurations

from sda_fast import Projector, bench
from sda_fast.diffusion import LowPass, Schedule
from sda_fast.diffusion.guidance import Guided, finish, guide
from sda_fast.diffusion.samplers import ReverseSteps
from sda_fast.engines import ENGINES, ClassifierStep, GuidedStep, UnguidedStep, create_engine
from sda_fast.errors import SdaError
from sda_fast.models import ADM, load_adm, load_classifier, load_dit
from sda_fast.projector import Purifier
from sda_fast.reference import UNet
from sda_fast.sampler import Sampler

HERE = [
    "eager",
    pytest.param("inductor", marks=pytest.mark.slow),  # the compilation of the original's small ADM, once
    pytest.param("onnx", marks=pytest.mark.slow),  # its export, once
]
OTHERS = HERE[1:]
BATCH, FACTOR = 2, 4


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(value, expected):
    return float((value - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def original(load_reference, load_weights):
    """The ADM that made the published runs."""
    tensors, meta = load_reference("adm_tiny")
    adm = ADM(**meta["config"]).eval()
    adm.load_state_dict(load_weights(tensors))
    return adm


@pytest.fixture(scope="module")
def prepared(original):
    """prepared(name): that engine with its program for two images of the guided step, made once for all tests."""
    step, programs = GuidedStep(original, LowPass(32, FACTOR)), {}

    def engine(name):
        if name not in programs:
            programs[name] = create_engine(name).prepare(step, step.example(BATCH))
        return SimpleNamespace(name=name, prepare=lambda step, example: programs[name], program=programs[name])

    return engine


@pytest.mark.parametrize("engine", HERE)
def test_single_steps_follow_the_original(original, load_reference, prepared, engine):
    run, errors = prepared(engine).program.run, {}
    for name, norm_group in (("dda_batch2", 2), ("dda_batch1", 1)):
        tensors, meta = load_reference(name)
        schedule, lowpass = Schedule.linear(meta["respacing"]), LowPass(32, meta["factor"])
        steps = ReverseSteps(schedule, meta["start_step"])
        down = lowpass.down(tensors["reference"]).expand(BATCH, -1, -1, -1)
        for k, position in enumerate(steps, 1):
            if k not in (2, 3, 10, 25, 40, 50):
                continue
            x = tensors["samples"][k - 2].expand(BATCH, -1, -1, -1)
            with torch.no_grad():
                conditioning = original.conditioning(schedule.timestep_map[position[:1]])
            terms = Guided(*run(x, conditioning, steps.table[position[:1]], down))
            noise = {"noise": tensors["noise"][k].float().expand(BATCH, -1, -1, -1)}
            ours = finish(x, terms, steps, position, noise, meta["scale"], "batch", norm_group)
            errors[name, k] = relative(ours, tensors["samples"][k - 1].expand(BATCH, -1, -1, -1))
    print(f"{engine}: single steps err by at most {max(errors.values()):.1e}")
    assert max(errors.values()) <= 1e-4, errors


@pytest.mark.parametrize("engine", OTHERS)
def test_output_and_gradient_are_those_of_the_reference(original, load_reference, prepared, engine):
    unet, lowpass = UNet(**load_reference("adm_tiny")[1]["config"]).eval(), LowPass(32, FACTOR)
    unet.load_state_dict(original.state_dict())
    x, conditioning, coefficients, down = GuidedStep(original, lowpass).example(BATCH)
    position, timesteps = torch.zeros(2, dtype=torch.int64), torch.full((BATCH,), 500)
    expected = guide(lambda x: unet(x, timesteps), lowpass, x, down, coefficients, position)
    terms = Guided(*prepared(engine).program.run(x, conditioning, coefficients, down))
    errors = {name: relative(getattr(terms, name), getattr(expected, name)) for name in Guided._fields}
    print(f"{engine}: {errors}")
    assert max(errors.values()) <= 1e-4, errors


@pytest.mark.parametrize("engine", OTHERS)
def test_a_projection_is_the_eager_one(original, prepared, engine):
    images, settings = draw(3, 3, 32, 32).clamp(-1, 1), {"respacing": "6", "start": 3, "batch_size": BATCH}
    ours = Projector(original, engine=prepared(engine), **settings)(images)
    assert (ours - Projector(original, **settings)(images)).abs().mean() <= 1e-5


@pytest.mark.parametrize("engine", HERE)
def test_an_image_does_not_depend_on_its_company(original, prepared, engine):
    """Alone, first and last of a padded batch: the same bits."""
    images, seeds = draw(3, 3, 32, 32).clamp(-1, 1), [7, 8, 9]
    project = Projector(original, respacing="6", start=2, batch_size=BATCH, engine=prepared(engine))
    together = project(images, seeds=seeds)
    for i in range(3):
        assert torch.equal(project(images[i : i + 1], seeds=seeds[i : i + 1])[0], together[i])
    assert torch.equal(project(images.flip(0), seeds=seeds[::-1]).flip(0), together)


@pytest.mark.parametrize("engine", HERE)
def test_a_program_tells_what_it_is_and_needs(prepared, engine):
    program = prepared(engine).program
    told = program.describe()
    assert json.loads(json.dumps(told)) == told
    assert (told["engine"], told["precision"]) == (engine, "fp32")
    assert told["torch"] == torch.__version__
    assert program.memory_needed() > BATCH * 32 * 32 * 32 * 4  # two images' first activation


@pytest.mark.parametrize("engine", ["onnx", pytest.param("inductor", marks=pytest.mark.slow)])
def test_synthesis_and_purification_are_the_eager_ones(tiny, engine):
    dit, adm, images = load_dit(tiny.dit), load_adm(tiny.adm), draw(3, 3, 16, 16).clamp(-1, 1)

    def sample(engine):
        return Sampler(dit, respacing="3", cfg_scale=1.5, batch_size=2, engine=engine)([0, 1, 2])

    def purify(engine):
        return Purifier(adm, 3, "6", batch_size=2, engine=engine)(images)

    # The unguided step is half of the guided one, which Inductor has compiled above.
    for make in (sample, purify) if engine == "onnx" else (sample,):
        assert (make(engine) - make("eager")).abs().mean() <= 1e-5


@pytest.mark.slow
def test_inductor_in_bf16_errs_no_more_than_plain_autocast(tiny):
    adm, lowpass = load_adm(tiny.adm), LowPass(16, FACTOR)
    unet = UNet(**adm.config).eval()
    unet.load_state_dict(adm.state_dict())
    step = GuidedStep(adm, lowpass, "bf16")
    inputs = x, _, coefficients, down = step.example(8)
    timesteps, position = torch.full((8,), 500), torch.zeros(2, dtype=torch.int64)

    def plain(x, dtype=torch.bfloat16):
        with torch.autocast("cpu", dtype):
            return unet(x, timesteps).float()

    exact = guide(lambda x: unet(x, timesteps), lowpass, x, down, coefficients, position)
    autocast = guide(plain, lowpass, x, down, coefficients, position)
    ours = Guided(*create_engine("inductor").prepare(step, inputs).run(*inputs))
    for name in ("out", "through_network"):
        error, plainly = (relative(getattr(t, name), getattr(exact, name)) for t in (ours, autocast))
        print(f"{name}: inductor in bf16 errs by {error:.1e}, plain autocast by {plainly:.1e}")
        assert 0 < error <= 1.5 * plainly


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_projections_in_half_precision_do_not_depend_on_company_either(tiny, precision):
    images, seeds = draw(3, 3, 16, 16).clamp(-1, 1), [7, 8, 9]
    for make in (Projector, Purifier):
        project = make(load_adm(tiny.adm), respacing="6", start=3, batch_size=2, precision=precision)
        together = project(images, seeds=seeds)
        assert together.dtype == torch.float32
        assert torch.equal(project(images[2:], seeds=seeds[2:])[0], together[2])
        exact = make(load_adm(tiny.adm), respacing="6", start=3, batch_size=2)(images, seeds=seeds)
        assert 0 < (together - exact).abs().mean() < 0.05


# Wrong use: one sentence that names the culprit and the way out.


def test_an_engine_nobody_knows():
    with pytest.raises(SdaError, match="engine 'steam' is not known; choose one of eager, inductor, onnx, trt"):
        create_engine("steam")
    assert list(ENGINES) == ["eager", "inductor", "onnx", "trt"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_onnx_runtime_in_half_precision(tiny, precision):
    project = Projector(load_adm(tiny.adm), respacing="6", start=1, engine="onnx", precision=precision)
    with pytest.raises(SdaError, match=f"runs fp32 on the CPU, not {precision} on cpu: give --engine inductor or"):
        project(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("module", ["onnxruntime", "onnx", "onnxscript"])
def test_without_the_onnx_extra(monkeypatch, module):
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SdaError, match=r'pip install "sda-fast\[onnx\]"'):
        create_engine("onnx")


@pytest.mark.parametrize("timing", ["max_autotune", "cudnn_benchmark"])
def test_what_is_timed_is_not_deterministic(tiny, timing):
    step = UnguidedStep(load_adm(tiny.adm))
    create_engine("inductor", **{timing: True}).check(step, torch.device("cpu"))
    create_engine("inductor", **{timing: True}, deterministic=False).check(step, torch.device("cuda"))
    with pytest.raises(SdaError, match=f"{timing} times its .* give deterministic=False too, or leave it out"):
        create_engine("inductor", **{timing: True}).check(step, torch.device("cuda"))


@pytest.mark.parametrize("model", bench.TINY)
def test_engines_take_what_make_gpu_asks_of_them(model):
    asked = configurations(model, "cuda", False)
    assert len(asked) == len(set(map(str, asked)))
    network = bench.random_model(*bench.TINY[model])
    for each in asked:
        step = bench.make_step(network, each.precision, each.guided, each.phase_convolutions)
        create_engine(each.engine, **each.options).check(step, torch.device("cuda"))


def test_without_a_compiler(tiny, tmp_path, monkeypatch):
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # failures are kept there
    step = ClassifierStep(load_classifier(tiny.resnet), 16)
    broken = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    message = "the inductor engine could not compile this step"
    # Not by monkeypatch, which leaves these settings deleted behind it.
    with config.patch(broken), pytest.raises(SdaError, match=message) as raised:
        create_engine("inductor").prepare(step, step.example(1))
    assert "\n" not in str(raised.value)
    assert "use --engine eager" in str(raised.value)
    print(raised.value)


def test_a_step_that_onnx_cannot_express(tiny, monkeypatch):
    def refuse(*_):
        raise RuntimeError("No ONNX function found\nfor this operator")

    monkeypatch.setattr("sda_fast.engines.onnx_runtime.export_onnx", refuse)
    step = UnguidedStep(load_adm(tiny.adm))
    with pytest.raises(SdaError, match=r"the onnx engine could not compile this step \(No ONNX function found\): use"):
        create_engine("onnx").prepare(step, step.example(1))
