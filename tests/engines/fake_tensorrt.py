"""A module `tensorrt` without TensorRT: exactly the calls of `tensorrt_protocol`, recorded, each able to fail.

An "engine" is the ONNX file itself, run by ONNX Runtime on the addresses it is given.
"""

import ctypes
import enum
import json
import types
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

REMOVED_IN_11 = {"BuilderFlag": ["FP16", "BF16", "INT8"], "NetworkDefinitionCreationFlag": ["EXPLICIT_BATCH"]}
_DTYPES = {"tensor(float)": "FLOAT", "tensor(int64)": "INT64"}
_NUMPY = {"FLOAT": np.float32, "INT64": np.int64}


class FakeTensorRT(types.ModuleType):
    """calls: (name, arguments) in order. failures: what a call returns instead, or the exception it raises, by name.

    Whatever fails first says `REASON` in the log.
    """

    REASON = "the reason in the log"

    def __init__(self, version: str = "10.13.3.9"):
        super().__init__("tensorrt")
        self.__version__ = version
        self.__spec__ = ModuleSpec("tensorrt", None)  # torch looks for it
        self.calls: list[tuple[Any, ...]] = []
        self.failures: dict[str, Any] = {}
        self.log: Any = None
        old = version.startswith("10.")
        flags = ["EXPLICIT_BATCH", "STRONGLY_TYPED"] if old else ["STRONGLY_TYPED"]
        self.NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", flags, start=0)
        self.BuilderFlag = enum.Enum("BuilderFlag", ["TF32", *(REMOVED_IN_11["BuilderFlag"] if old else [])])
        self.MemoryPoolType = enum.Enum("MemoryPoolType", ["WORKSPACE"])
        self.HardwareCompatibilityLevel = enum.Enum("HardwareCompatibilityLevel", ["NONE", "AMPERE_PLUS"])
        self.ExecutionContextAllocationStrategy = enum.Enum("Strategy", ["STATIC", "USER_MANAGED"])
        self.TensorIOMode = enum.Enum("TensorIOMode", ["INPUT", "OUTPUT"])
        self.DataType = enum.Enum("DataType", ["FLOAT", "INT64", "FP8"])
        self.ILogger = _ILogger
        self.Builder, self.OnnxParser = partial(self._make, Builder), partial(self._make, OnnxParser)
        self.Runtime = partial(self._make, Runtime)

    def _make(self, cls: type, *arguments: Any) -> Any:
        self.log = arguments[-1]
        assert self.log.ready, "ILogger.__init__ was not called"
        self.call(cls.__name__, result=True)
        return cls(self, *arguments[:-1])

    def call(self, name: str, *arguments: Any, result: Any = None) -> Any:
        """Records a call; its result, or its failure."""
        self.calls.append((name, *arguments))
        if name not in self.failures:
            return result
        self.log.log(self.ILogger.Severity.WARNING, "not this")
        self.log.log(self.ILogger.Severity.ERROR, self.REASON)
        failure = self.failures[name]
        if isinstance(failure, Exception):
            raise failure
        return failure

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]


class _ILogger:
    Severity = enum.Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING"])
    ready = False

    def __init__(self) -> None:
        self.ready = True


class _Object:
    """Attributes outside of __slots__ cannot be set, as in the bindings."""

    __slots__ = ("_trt",)

    def __init__(self, trt: FakeTensorRT):
        self._trt = trt


class Builder(_Object):
    __slots__ = ()

    def create_network(self, flags):
        return self._trt.call("create_network", flags, result=Network(self._trt))

    def create_builder_config(self):
        return self._trt.call("create_builder_config", result=BuilderConfig(self._trt))

    def create_optimization_profile(self):
        return self._trt.call("create_optimization_profile", result=Profile(self._trt))

    def build_serialized_network(self, network, config):
        header = json.dumps({"version": self._trt.__version__, "profile": config._profile}).encode()
        return self._trt.call("build_serialized_network", result=header + b"\n" + network._model)


class Network(_Object):
    __slots__ = ("_model",)


class OnnxParser(_Object):
    __slots__ = ("_network",)

    def __init__(self, trt, network):
        super().__init__(trt)
        self._network = network

    def parse_from_file(self, model):
        self._network._model = onnx.load(model).SerializeToString()  # with its weights
        return self._trt.call("parse_from_file", Path(model).name, result=True)

    @property
    def num_errors(self):
        return 1

    def get_error(self, index):
        return ParserError(self._trt)


class ParserError(_Object):
    __slots__ = ()

    def desc(self):
        return "what the parser says"

    def node_name(self):
        return "node_7"

    def node_operator(self):
        return "Conv"


class Profile(_Object):
    __slots__ = ("_shapes",)

    def __init__(self, trt):
        super().__init__(trt)
        self._shapes = {}

    def set_shape(self, input, min, opt, max):
        self._shapes[input] = min, opt, max
        return self._trt.call("set_shape", input, min, opt, max)


class BuilderConfig(_Object):
    __slots__ = ("_cache", "_profile", "builder_optimization_level", "hardware_compatibility_level")

    def __init__(self, trt):
        super().__init__(trt)
        self._profile = {}

    def set_memory_pool_limit(self, pool, pool_size):
        return self._trt.call("set_memory_pool_limit", pool.name, pool_size)

    def clear_flag(self, flag):
        return self._trt.call("clear_flag", flag.name)

    def add_optimization_profile(self, profile):
        self._profile = profile._shapes
        return self._trt.call("add_optimization_profile", result=0)

    def create_timing_cache(self, serialized_timing_cache):
        cache = TimingCache(self._trt)
        cache._content = serialized_timing_cache
        return self._trt.call("create_timing_cache", serialized_timing_cache, result=cache)

    def set_timing_cache(self, cache, ignore_mismatch):
        self._cache = cache
        return self._trt.call("set_timing_cache", ignore_mismatch, result=cache._content in (b"", b"timed"))

    def get_timing_cache(self):
        return self._trt.call("get_timing_cache", result=self._cache)


class TimingCache(_Object):
    __slots__ = ("_content",)

    def serialize(self):
        return self._trt.call("serialize", result=b"timed")


class Runtime(_Object):
    __slots__ = ()

    def deserialize_cuda_engine(self, serialized_engine):
        header, _, model = serialized_engine.partition(b"\n")
        if json.loads(header)["version"] != self._trt.__version__:
            self._trt.log.log(self._trt.ILogger.Severity.ERROR, "the plan is of another version")
            return self._trt.call("deserialize_cuda_engine")
        engine = Engine(self._trt, model, json.loads(header)["profile"])
        return self._trt.call("deserialize_cuda_engine", result=engine)


class Engine(_Object):
    __slots__ = ("_inputs", "_outputs", "_profile", "_session")

    def __init__(self, trt, model, profile):
        super().__init__(trt)
        self._session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self._profile = profile
        self._inputs = {x.name: x for x in self._session.get_inputs()}
        self._outputs = {x.name: x for x in self._session.get_outputs()}

    @property
    def num_io_tensors(self):
        return len(self._inputs) + len(self._outputs)

    @property
    def device_memory_size_v2(self):
        return 4096

    def get_tensor_name(self, index):
        return self._trt.call("get_tensor_name", index, result=[*self._outputs, *self._inputs][index])

    def get_tensor_mode(self, name):
        modes = self._trt.TensorIOMode
        return self._trt.call("get_tensor_mode", name, result=modes.INPUT if name in self._inputs else modes.OUTPUT)

    def get_tensor_dtype(self, name):
        kind = _DTYPES[(self._inputs | self._outputs)[name].type]
        return self._trt.call("get_tensor_dtype", name, result=self._trt.DataType[kind])

    def create_execution_context(self, strategy):
        return self._trt.call("create_execution_context", strategy.name, result=Context(self._trt, self))


class Context(_Object):
    __slots__ = ("_addresses", "_engine", "_shapes")

    def __init__(self, trt, engine):
        super().__init__(trt)
        self._engine, self._shapes, self._addresses = engine, {}, {}

    def set_device_memory(self, memory, size):
        assert memory
        return self._trt.call("set_device_memory", size)

    def set_input_shape(self, name, shape):
        self._shapes[name] = shape
        if name in self._engine._profile:
            low, _, high = self._engine._profile[name]
            fits = all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))
        else:
            fits = list(shape) == self._engine._inputs[name].shape
        return self._trt.call("set_input_shape", name, shape, result=fits)

    def infer_shapes(self):
        return self._trt.call(
            "infer_shapes", result=[name for name in self._engine._inputs if name not in self._shapes]
        )

    def get_tensor_shape(self, name):
        if name not in self._shapes:
            outputs = self._run({x: np.zeros(self._shapes[x], self._dtype(x)) for x in self._engine._inputs})
            self._shapes |= {x: y.shape for x, y in outputs.items()}
        return self._trt.call("get_tensor_shape", name, result=self._shapes[name])

    def set_tensor_address(self, name, memory):
        self._addresses[name] = memory
        return self._trt.call("set_tensor_address", name, result=True)

    def execute_async_v3(self, stream_handle):
        if (result := self._trt.call("execute_async_v3", stream_handle, result=True)) is True:
            outputs = self._run({x: self._at_address(x) for x in self._engine._inputs})
            for name, value in outputs.items():
                self._at_address(name)[...] = value
        return result

    def _run(self, feed):
        names = list(self._engine._outputs)
        return dict(zip(names, self._engine._session.run(names, feed), strict=True))

    def _dtype(self, name):
        return _NUMPY[_DTYPES[(self._engine._inputs | self._engine._outputs)[name].type]]

    def _at_address(self, name):
        shape, dtype = self._shapes[name], np.dtype(self._dtype(name))
        size = int(np.prod(shape)) * dtype.itemsize
        memory = (ctypes.c_char * size).from_address(self._addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)
