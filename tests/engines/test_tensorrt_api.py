"""The calls to TensorRT: their order, both major versions, and that each one's failure is a sentence."""

import inspect
import sys

import pytest
import torch

from sda_fast.engines import tensorrt_api, tensorrt_protocol
from sda_fast.engines.tensorrt_api import BuildOptions, Execution
from sda_fast.errors import SdaError

PROFILES = {"x": ((1, 2), (3, 2), (5, 2))}
OPTIONS = BuildOptions(4, 2**20, True, PROFILES, b"")
REFUSALS = {
    # building
    "Builder": TypeError("factory function returned nullptr"),
    "create_network": None,
    "OnnxParser": TypeError("factory function returned nullptr"),
    "parse_from_file": False,
    "create_builder_config": None,
    "clear_flag": RuntimeError("no"),
    "set_memory_pool_limit": RuntimeError("no"),
    "create_optimization_profile": None,
    "set_shape": ValueError("no"),
    "add_optimization_profile": -1,
    "create_timing_cache": None,
    "set_timing_cache": False,
    "build_serialized_network": None,
    "get_timing_cache": None,
    "serialize": None,
    # loading and running
    "Runtime": TypeError("factory function returned nullptr"),
    "deserialize_cuda_engine": None,
    "create_execution_context": None,
    "get_tensor_name": RuntimeError("no"),
    "get_tensor_mode": RuntimeError("no"),
    "set_device_memory": RuntimeError("no"),
    "set_input_shape": False,
    "infer_shapes": ["x"],
    "get_tensor_dtype": RuntimeError("no"),
    "get_tensor_shape": RuntimeError("no"),
    "set_tensor_address": False,
    "execute_async_v3": False,
}


@pytest.fixture(scope="module")
def double(tmp_path_factory):
    """Files of y = x + x: for x [3, 2], and for x [N, 2]."""
    from onnx import TensorProto, helper, save

    def write(name, rows):
        x, y = (helper.make_tensor_value_info(value, TensorProto.FLOAT, [rows, 2]) for value in "xy")
        graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", [x], [y])
        path = tmp_path_factory.mktemp("onnx") / name
        save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10), path)
        return path

    return write("static.onnx", 3), write("dynamic.onnx", "N")


def run(plan):
    """The output for x [3, 2] of ones, and what kept memory alive."""
    execution = Execution(plan)
    work = torch.empty(execution.memory, dtype=torch.uint8)
    execution.set_memory(work.data_ptr(), execution.memory)
    execution.set_shapes({"x": (3, 2)})
    tensors = {}
    for name in (*execution.inputs, *execution.outputs):
        shape, dtype = execution.tensor(name)
        tensors[name] = torch.ones(shape, dtype=dtype)
        execution.bind(name, tensors[name].data_ptr())
    execution.enqueue(77)
    return tensors["y"]


@pytest.mark.parametrize(("version", "flags"), [("10.13.3.9", 1 << 1), ("11.4.0.106", 0)])
def test_a_static_build_in_order(trt, double, version, flags):
    fake = trt(version)
    plan, timings = tensorrt_api.build(double[0], BuildOptions())
    assert timings == b""
    assert fake.calls == [
        ("Builder",),
        ("create_network", flags),  # the number of the flag is that of the version
        ("OnnxParser",),
        ("parse_from_file", "static.onnx"),
        ("create_builder_config",),
        ("clear_flag", "TF32"),
        ("build_serialized_network",),
    ]
    fake.calls.clear()
    assert torch.equal(run(plan), torch.full((3, 2), 2.0))
    order = [*dict.fromkeys(fake.names())]
    assert order == [
        *("Runtime", "deserialize_cuda_engine", "create_execution_context", "get_tensor_name", "get_tensor_mode"),
        *("set_device_memory", "set_input_shape", "infer_shapes", "get_tensor_dtype", "get_tensor_shape"),
        *("set_tensor_address", "execute_async_v3"),
    ]
    assert ("create_execution_context", "USER_MANAGED") in fake.calls
    assert ("execute_async_v3", 77) in fake.calls


@pytest.mark.parametrize("version", ["10.13.3.9", "11.4.0.106"])
def test_a_dynamic_build_in_order(trt, double, version):
    fake = trt(version)
    plan, timings = tensorrt_api.build(double[1], OPTIONS)
    assert timings == b"timed"
    assert fake.calls[4:] == [
        ("create_builder_config",),
        ("clear_flag", "TF32"),
        ("set_memory_pool_limit", "WORKSPACE", 2**20),
        ("create_optimization_profile",),
        ("set_shape", "x", (1, 2), (3, 2), (5, 2)),
        ("add_optimization_profile",),
        ("create_timing_cache", b""),
        ("set_timing_cache", False),
        ("build_serialized_network",),
        ("get_timing_cache",),
        ("serialize",),
    ]
    assert torch.equal(run(plan), torch.full((3, 2), 2.0))
    with pytest.raises(SdaError, match=r"could not run inputs of these shapes \(x cannot be \[6, 2\]\)"):
        Execution(plan).set_shapes({"x": (6, 2)})
    with pytest.raises(SdaError, match="shapes of x are missing"):
        Execution(plan).set_shapes({})


def test_timings_of_elsewhere_are_replaced_by_none(trt, double):
    fake = trt()
    tensorrt_api.build(double[0], BuildOptions(timing_cache=b"of another GPU"))
    assert [c for c in fake.calls if "timing" in c[0]] == [
        ("create_timing_cache", b"of another GPU"),
        ("set_timing_cache", False),
        ("create_timing_cache", b""),
        ("set_timing_cache", False),
        ("get_timing_cache",),
    ]


@pytest.mark.parametrize("way", ["refuses", "raises"])
@pytest.mark.parametrize("call", REFUSALS)
def test_every_call_that_fails_gives_a_sentence(trt, double, call, way):
    fake = trt()
    fake.failures[call] = REFUSALS[call] if way == "refuses" else RuntimeError("a C++ exception")
    with pytest.raises(SdaError) as caught:
        run(tensorrt_api.build(double[1], OPTIONS)[0])
    sentence = str(caught.value)
    assert sentence.startswith("TensorRT could not ")
    assert sentence.endswith("use --engine inductor")
    assert "\n" not in sentence
    # The first error in the log; for a file also the parser's own.
    assert fake.REASON in sentence
    if (call, way) == ("parse_from_file", "refuses"):
        assert "what the parser says at node 'node_7', Conv" in sentence
    # Nothing is called after what failed.
    if call not in ("create_timing_cache", "set_timing_cache"):
        assert fake.names()[-1] == call


def test_every_call_of_the_protocol_can_fail_here():
    """And the fake has neither more nor less than the protocol."""
    import fake_tensorrt

    told_apart = {"num_errors", "get_error", "desc", "node_name", "node_operator"}  # the parser's message
    told_apart |= {"num_io_tensors", "device_memory_size_v2"}  # properties that cannot fail
    asked = set()
    for name, protocol in vars(tensorrt_protocol).items():
        if inspect.isclass(protocol) and hasattr(fake_tensorrt, name) and name != "TensorRT":
            calls = {n for n in vars(protocol) if not n.startswith("_")} - {"Severity"}
            has = {n for n in vars(getattr(fake_tensorrt, name)) if not n.startswith("_")}
            assert calls | set(getattr(protocol, "__annotations__", {})) == has, name
            asked |= calls
    asked |= {"Builder", "OnnxParser", "Runtime"}
    assert asked - told_apart == set(REFUSALS)


def test_what_11_removed_is_not_there(trt):
    assert hasattr(trt("10.13.3.9").BuilderFlag, "FP16")
    assert not hasattr(trt("11.4.0.106").BuilderFlag, "FP16")


def test_a_type_that_torch_has_not_is_named(trt, double):
    fake = trt()
    execution = Execution(tensorrt_api.build(double[0], BuildOptions())[0])
    fake.failures["get_tensor_dtype"] = fake.DataType.FP8
    with pytest.raises(SdaError, match=r"could not describe x \(its type FP8 is none of torch's"):
        execution.tensor("x")


def test_absent_and_old_versions_say_what_to_install(trt, monkeypatch):
    trt("8.6.1")
    with pytest.raises(SdaError, match=r'8\.6\.1 is too old for the trt engine: pip install "sda-fast\[trt\]"'):
        tensorrt_api.version()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(SdaError, match=r'needs TensorRT: pip install "sda-fast\[trt\]"'):
        tensorrt_api.version()
