"""The trt engine from step to numbers, on a TensorRT and a GPU that are fakes, and what it says without them."""

import json
import shutil
import sys
from types import SimpleNamespace

import onnx_rules
import pytest
import torch
from torch import nn

from sda_fast.diffusion import LowPass
from sda_fast.engines import ClassifierStep, DiTStep, GuidedStep, UnguidedStep, create_engine, onnx_export, tensorrt
from sda_fast.engines.graph import trace
from sda_fast.engines.onnx_export import export_onnx, portable_graph, write_onnx
from sda_fast.engines.tensorrt import TensorRTEngine, TensorRTProgram, graph_hash
from sda_fast.engines.tensorrt_api import Execution
from sda_fast.errors import SdaError
from sda_fast.models import ADM, load_dit

# The smallest ADM with every kind of block: up, down, shortcut by 1x1, attention.
ADM_CONFIG = {
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 6,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "model_channels": 32,
    "channel_mult": [1, 1],
    "num_res_blocks": 1,
    "attention_resolutions": [],
    "num_head_channels": 32,
}


def guided_step(precision):
    torch.manual_seed(0)
    adm = ADM(**ADM_CONFIG)
    for parameter in adm.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return GuidedStep(adm, LowPass(8, 2), precision)


@pytest.fixture
def small():
    """A step whose export takes a second."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 8 * 8, 5))
    return ClassifierStep(network, 8)


@pytest.fixture
def engine(tmp_path):
    return lambda **options: TensorRTEngine(cache_dir=tmp_path / "engines", **options)


@pytest.fixture
def written(monkeypatch, tmp_path):
    """The ONNX file that the engine built last, which is not there after the build."""

    def write_and_keep(portable, path):
        write_onnx(portable, path)
        shutil.copytree(path.parent, tmp_path / "kept", dirs_exist_ok=True)

    monkeypatch.setattr(tensorrt, "write_onnx", write_and_keep)
    return tmp_path / "kept" / "step.onnx"


def check_file(path):
    operators, problems = onnx_rules.check(path)
    assert problems == {}
    assert operators["Conv"] > 40
    return operators


def test_the_guided_step_from_weights_to_numbers_at_three_batches(trt, engine, written, tmp_path):
    """One build with a profile; ONNX Runtime reads and writes the very addresses that the engine binds."""
    fake = trt()
    step, dynamic = guided_step("fp32"), engine(profile=(1, 3, 16), timing_cache=False)
    programs = {3: dynamic.prepare(step, step.example(3))}
    (path,) = (tmp_path / "engines").glob("*.plan")
    plan = path.read_bytes()
    for batch in (1, 16):
        gpu = tensorrt.Gpu(torch.device("cpu"))
        programs[batch] = TensorRTProgram(dynamic, step, step.example(batch), Execution(plan), len(plan), gpu)
    for batch, program in programs.items():
        generator = torch.Generator().manual_seed(batch)
        inputs = tuple(x + 0.1 * torch.randn(x.shape, generator=generator) for x in step.example(batch))
        for name, found, expected in zip(step.outputs, program.run(*inputs), step(*inputs), strict=True):
            assert found.dtype == expected.dtype == torch.float32
            assert (found - expected).norm() <= 1e-4 * expected.norm(), name
    shapes = [call for call in fake.calls if call[0] == "set_shape"]
    assert shapes == [
        ("set_shape", "x", (1, 3, 8, 8), (3, 3, 8, 8), (16, 3, 8, 8)),
        ("set_shape", "reference_down", (1, 3, 4, 4), (3, 3, 4, 4), (16, 3, 4, 4)),
    ]
    check_file(written)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_guided_step_in_half_precision_is_what_tensorrt_supports(precision, tmp_path):
    import onnx

    path = tmp_path / "step.onnx"
    export_onnx(guided_step(precision), path, 2)
    assert check_file(path)["Cast"] > 40
    kinds = {"bf16": onnx.TensorProto.BFLOAT16, "fp16": onnx.TensorProto.FLOAT16}
    graph = onnx.load(path, load_external_data=False).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    kernels = [types[node.input[1]] for node in graph.node if node.op_type == "Conv"]
    # As published, the network's last layer stays in float32, and so does its backward convolution.
    assert kernels.count(onnx.TensorProto.FLOAT) == 2
    assert kernels.count(kinds[precision]) == len(kernels) - 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_batch_norm_in_half_precision_becomes_part_of_its_convolution(precision, tmp_path):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm, nn.Flatten(), nn.Linear(4 * 6 * 6, 5))
    export_onnx(ClassifierStep(network, 8, precision), tmp_path / "step.onnx", 2)
    operators, problems = onnx_rules.check(tmp_path / "step.onnx")
    assert problems == {}
    assert operators["Conv"] == 1
    assert "BatchNormalization" not in operators


def test_weights_are_not_repeated_for_every_image():
    step = UnguidedStep(ADM(**{**ADM_CONFIG, "channel_mult": [1]}))
    largest = max(parameter.numel() for parameter in step.parameters())
    assert all(constant.numel() <= largest for constant in trace(step, step.example(16), "portable").buffers())


def test_every_problem_of_a_file_is_found(tmp_path):
    """The rules themselves: one graph that breaks them."""
    from onnx import TensorProto, helper, save

    def value(name, shape, kind=TensorProto.FLOAT):
        return helper.make_tensor_value_info(name, kind, shape)

    index, axes = value("index", [1, 4], TensorProto.INT64), value("axes", [1], TensorProto.INT64)
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["a"]),
        helper.make_node("ScatterND", ["a", "index", "updates"], ["b"], reduction="add"),
        helper.make_node("Det", ["b"], ["c"]),
        helper.make_node("Cast", ["c"], ["d"], to=TensorProto.DOUBLE),
        helper.make_node("ReduceMean", ["b", "axes"], ["e"]),
    ]
    inputs = [value("x", [1, 2, 4, 4]), value("kernel", [2, 2, 1, 1]), index, value("updates", [1]), axes]
    outputs = [value("d", [1, 2], TensorProto.DOUBLE), value("e", [1, 2, 4, 4])]
    graph = helper.make_graph(nodes, "bad", inputs, outputs)
    path = tmp_path / "bad.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10), path)
    assert dict(onnx_rules.check(path)[1]) == {
        "a tensor of type double": 1,
        "Conv: the kernel is not an initializer": 1,
        "ScatterND: a reduction": 1,
        "::Det is not supported": 1,
        "ReduceMean: axes are not constant": 1,
    }


def test_an_engine_is_traced_and_built_once_and_loaded_after(trt, engine, small, tmp_path, monkeypatch):
    fake = trt("11.4.0.106")
    example = small.example(2)
    traced = []
    monkeypatch.setattr(onnx_export, "trace", lambda *args, **options: traced.append(1) or trace(*args, **options))
    first = engine().prepare(small, example).run(*example)[0].clone()
    assert len(traced) == 1
    assert torch.allclose(first, small(*example)[0], atol=1e-6)
    fake.calls.clear()
    second = engine().prepare(small, example)
    assert "build_serialized_network" not in fake.names()
    assert torch.equal(second.run(*example)[0], first)
    assert {p.suffix for p in (tmp_path / "engines").iterdir()} == {".plan", ".json", ".lock"}


def test_one_engine_with_a_profile_serves_its_batches(trt, engine, small):
    fake = trt()
    for batch in (2, 1, 4):
        example = small.example(batch)
        program = engine(profile=(1, 2, 4)).prepare(small, example)
        assert torch.allclose(program.run(*example)[0], small(*example)[0], atol=1e-6)
    assert fake.names().count("build_serialized_network") == 1


def test_timings_are_kept_for_the_next_build(trt, engine, small):
    fake = trt()
    engine().prepare(small, small.example(2))
    engine(builder_optimization_level=4).prepare(small, small.example(2))
    assert [call[1] for call in fake.calls if call[0] == "create_timing_cache"] == [b"", b"timed"]
    fake.calls.clear()
    engine(timing_cache=False, builder_optimization_level=5).prepare(small, small.example(2))
    assert "create_timing_cache" not in fake.names()


def test_a_plan_that_tensorrt_refuses_is_built_again(trt, engine, small, caplog, monkeypatch):
    trt("10.13.3.9")
    example = small.example(2)
    engine().prepare(small, example)
    fake = trt("10.16.1.11")  # which claims to be the same
    monkeypatch.setattr(tensorrt.tensorrt_api, "version", lambda: "10.13.3.9")
    program = engine().prepare(small, example)
    (line,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "the plan is of another version" in line
    assert torch.allclose(program.run(*example)[0], small(*example)[0], atol=1e-6)
    fake.calls.clear()
    engine().prepare(small, example)
    assert "build_serialized_network" not in fake.names()


def test_a_damaged_plan_is_never_loaded(trt, engine, small, caplog, tmp_path):
    fake = trt()
    example = small.example(2)
    engine(timing_cache=False).prepare(small, example)
    (plan,) = (tmp_path / "engines").glob("*.plan")
    plan.write_bytes(plan.read_bytes()[:-8])
    fake.calls.clear()
    engine(timing_cache=False).prepare(small, example)
    assert "is not as it was stored" in caplog.text
    assert fake.names().count("deserialize_cuda_engine") == 1
    assert fake.names().index("build_serialized_network") < fake.names().index("deserialize_cuda_engine")


def test_a_failed_build_is_a_sentence_and_leaves_nothing(trt, engine, small, tmp_path):
    fake = trt()
    fake.failures["build_serialized_network"] = None
    with pytest.raises(SdaError, match=r"could not build an engine \(the reason in the log\): use --engine inductor"):
        engine().prepare(small, small.example(2))
    assert {p.suffix for p in (tmp_path / "engines").iterdir()} == {".lock"}


def test_a_fresh_engine_that_does_not_load_is_not_built_twice(trt, engine, small):
    fake = trt()
    fake.failures["create_execution_context"] = None
    with pytest.raises(SdaError, match="could not load an engine"):
        engine().prepare(small, small.example(2))
    assert fake.names().count("build_serialized_network") == 1


def settings(step, batch=2, version="10.13.3.9", machine=None, **options):
    gpu = SimpleNamespace(
        identity=lambda: {"gpu": "A", "capability": "9.0", "driver": "D", "cuda": "13", **(machine or {})}
    )
    engine = TensorRTEngine(**options)
    profiles = engine._profiles(step, batch)
    portable = portable_graph(step, None if profiles else batch)
    return json.dumps(engine._settings(portable, step.precision, profiles, gpu), sort_keys=True)


def test_whatever_a_plan_depends_on_gives_it_another_key(trt, small):
    trt()
    keys = {
        "as it is": settings(small),
        "batch": settings(small, 3),
        "level": settings(small, builder_optimization_level=5),
        "workspace": settings(small, workspace_bytes=2**30),
        "compatible": settings(small, hardware_compatible=True),
        "profile": settings(small, profile=(1, 2, 4)),
        "another profile": settings(small, profile=(1, 2, 5)),
        "gpu": settings(small, machine={"gpu": "B"}),
        "capability": settings(small, machine={"capability": "8.0"}),
        "driver": settings(small, machine={"driver": "E"}),
        "cuda": settings(small, machine={"cuda": "12"}),
        "half": settings(ClassifierStep(small.model, 8, "bf16")),
    }
    trt("10.16.1.11")
    keys["tensorrt"] = settings(small)
    small.model[1] = nn.SiLU()
    keys["graph"] = settings(small)
    small.model[1] = nn.ReLU()
    trt()
    assert settings(small) == keys["as it is"]
    weight = small.model[3].weight.data.view(torch.int32)
    weight[2, 7] ^= 1
    keys["one bit of a weight"] = settings(small)
    assert len(set(keys.values())) == len(keys)
    weight[2, 7] ^= 1
    assert settings(small, cuda_graphs=False, timing_cache=False) == keys["as it is"]
    # One engine for all of them.
    assert settings(small, hardware_compatible=True, machine={"gpu": "B", "capability": "8.0"}) == keys["compatible"]


def test_the_hash_of_a_graph_leaves_the_number_of_the_gpu_out():
    graphs = []
    for device in ("cuda:0", "cuda:1", "cpu"):
        code = f"return torch.zeros([2], device='{device}')"
        graphs.append(SimpleNamespace(code=code, graph=SimpleNamespace(find_nodes=lambda op: [])))
    first, second, third = map(graph_hash, graphs)
    assert first == second != third


def test_a_run_checks_shapes_and_writes_the_same_outputs(trt, engine, small):
    trt()
    program = engine().prepare(small, small.example(2))
    one = program.run(torch.ones(2, 3, 8, 8))[0]
    kept = one.clone()
    strided = torch.zeros(2, 8, 8, 3).permute(0, 3, 1, 2)  # channels_last
    two = program.run(strided)[0]
    assert one.data_ptr() == two.data_ptr()
    assert not torch.equal(two, kept)
    assert torch.allclose(two, small(strided)[0], atol=1e-6)
    with pytest.raises(SdaError, match=r"takes inputs of \[2, 3, 8, 8\], not \[1, 3, 8, 8\]"):
        program.run(torch.ones(1, 3, 8, 8))


@pytest.mark.parametrize("graphs", [True, False])
def test_a_cuda_graph_is_captured_after_one_run(trt, engine, small, graphs, monkeypatch):
    fake = trt()
    made = []
    real = tensorrt.Gpu
    monkeypatch.setattr(tensorrt, "Gpu", lambda device: made.append(real(device)) or made[-1])
    program = engine(cuda_graphs=graphs).prepare(small, small.example(2))
    assert made[0].captured == ([1] if graphs else [])
    assert fake.names().count("execute_async_v3") == 1
    program.run(*small.example(2))
    assert [call for call in fake.calls if call[0] == "execute_async_v3"] == [("execute_async_v3", 77)] * 2


def test_what_a_program_says_of_itself(trt, engine, small):
    trt()
    program = engine().prepare(small, small.example(2))
    said = json.loads(json.dumps(program.describe()))
    assert {k: said[k] for k in ("engine", "precision", "tensorrt", "builder_optimization_level", "cuda_graphs")} == {
        "engine": "trt",
        "precision": "fp32",
        "tensorrt": "10.13.3.9",
        "builder_optimization_level": 3,
        "cuda_graphs": True,
    }
    weights = sum(p.nbytes for p in small.parameters())
    assert program.memory_needed() > 4096 + weights + 2 * (3 * 8 * 8 + 5) * 4


@pytest.mark.parametrize(("profile", "batch", "sentence"), [((4, 2, 8), 2, "in this order"), ((2, 4, 8), 1, "outside")])
def test_profiles_that_cannot_be(trt, engine, small, profile, batch, sentence):
    trt()
    with pytest.raises(SdaError, match=sentence):
        engine(profile=profile).prepare(small, small.example(batch))


def test_a_dit_under_guidance_has_a_profile(trt, engine, written, tiny):
    fake = trt()
    torch.manual_seed(0)
    dit = load_dit(tiny.dit)
    step = DiTStep(dit, cfg_scale=4.0)
    for batch in (3, 1, 4):
        program = engine(profile=(1, 3, 4)).prepare(step, step.example(batch))
        x, conditioning = step.example(batch)
        classes = torch.cat([torch.arange(batch) % dit.num_classes, torch.full((batch,), dit.num_classes)])
        inputs = (x, dit.conditioning(torch.arange(batch).repeat(2), classes).detach().view_as(conditioning))
        (found,), (expected,) = program.run(*inputs), step(*inputs)
        assert (found - expected).norm() <= 1e-4 * expected.norm()
    size, width = x.shape[-1], conditioning.shape[-1]
    assert [call for call in fake.calls if call[0] == "set_shape"] == [  # one build
        ("set_shape", "x", *((n, x.shape[1], size, size) for n in (1, 3, 4))),
        ("set_shape", "conditioning", *((2, n, width) for n in (1, 3, 4))),
    ]
    assert onnx_rules.check(written)[1] == {}


def test_without_tensorrt_or_a_gpu_it_says_so(monkeypatch, trt, small):
    real = tensorrt.Gpu
    trt()
    monkeypatch.setattr(tensorrt, "Gpu", real)
    with pytest.raises(SdaError, match="runs on an NVIDIA GPU, not on cpu: give --device cuda or --engine inductor"):
        create_engine("trt").prepare(small, small.example(1))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(SdaError, match=r'pip install "sda-fast\[trt\]"'):
        create_engine("trt").prepare(small, small.example(1))
