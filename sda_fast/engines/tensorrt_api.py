"""Every call to TensorRT that this package makes, and what each may be expected to do.

Written for TensorRT 10.12 and later and 11; `tensorrt_protocol` holds exactly the calls used. TensorRT reports most
failures as None or False, some as exceptions of any kind, and says why in its log; here all of them become an SdaError
with the first thing that the parser or the log said.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from sda_fast.engines.tensorrt_protocol import (
    Builder,
    BuilderConfig,
    OnnxParser,
    Shape,
    TensorRT,
    TimingCache,
)
from sda_fast.errors import SdaError

T = TypeVar("T")
# What every build sets, by name: names last, numbers do not. float32 means float32.
FLAGS = {"STRONGLY_TYPED": True, "TF32": False}


@dataclass(frozen=True)
class BuildOptions:
    """profiles: least, usual and greatest shape of every input whose shape is open. workspace_bytes: what a layer may
    take besides its tensors; None leaves it to TensorRT. timing_cache: what an earlier build returned."""

    optimization_level: int = 3
    workspace_bytes: int | None = None
    hardware_compatible: bool = False
    profiles: Mapping[str, tuple[Shape, Shape, Shape]] = field(default_factory=dict)
    timing_cache: bytes | None = None


def version() -> str:
    """TensorRT's, in full. Raises SdaError where it is not installed or too old."""
    return _tensorrt().__version__


def build(onnx: Path, options: BuildOptions) -> tuple[bytes, bytes]:
    """The serialised engine of an ONNX file, and the timing cache with what this build has timed (empty if without).

    Takes minutes, on the current device. Raises SdaError with the parser's or the builder's first message.
    """
    trt = _tensorrt()
    log = _Log(trt)
    with log.explained("start its builder"):
        builder = trt.Builder(log.logger)
    with log.explained(f"read {onnx.name}"):
        # Types as the file has them: always so in 11, where the flag does nothing and will go.
        typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if _major(trt) == 10 else 0
        network = _required(builder.create_network(typed))
        parser = trt.OnnxParser(network, log.logger)
        if not parser.parse_from_file(str(onnx)):
            raise _RefusedError(_parser_message(parser))
    with log.explained("take the build's settings"):
        config = _required(builder.create_builder_config())
        _configure(trt, builder, config, options)
        timings = None
        if options.timing_cache is not None:
            timings = _set_timing_cache(config, options.timing_cache)
    with log.explained("build an engine"):
        plan = bytes(_required(builder.build_serialized_network(network, config)))
    with log.explained("give its timings back"):
        return plan, b"" if timings is None else bytes(_required(_required(config.get_timing_cache()).serialize()))


def _configure(trt: TensorRT, builder: Builder, config: BuilderConfig, options: BuildOptions) -> None:
    config.builder_optimization_level = options.optimization_level
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.profiles:
        profile = _required(builder.create_optimization_profile())
        for name, shapes in options.profiles.items():
            profile.set_shape(name, *shapes)
        if config.add_optimization_profile(profile) < 0:
            raise _RefusedError("the profile is not valid")


def _set_timing_cache(config: BuilderConfig, earlier: bytes) -> TimingCache:
    # Of another version or GPU it is refused; then an empty one takes its place.
    cache = config.create_timing_cache(earlier)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = _required(config.create_timing_cache(b""))
        if not config.set_timing_cache(cache, ignore_mismatch=False):
            raise _RefusedError("an empty timing cache is refused")
    return cache


class Execution:
    """An engine ready to run at one set of shapes on tensors of the caller's, whom also its working memory belongs to.

    inputs, outputs: the names of its tensors. memory: bytes that `set_memory` must provide.
    """

    def __init__(self, plan: bytes):
        """Loads a plan: code that will run, so only what `build` gave. Raises SdaError if TensorRT refuses it."""
        trt = _tensorrt()
        self._log = _Log(trt)
        with self._log.explained("load an engine"):
            self._runtime = trt.Runtime(self._log.logger)
            self._engine = _required(self._runtime.deserialize_cuda_engine(plan))
            strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
            self._context = _required(self._engine.create_execution_context(strategy))
            names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
            is_input = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
            self.inputs = tuple(name for name in names if is_input[name])
            self.outputs = tuple(name for name in names if not is_input[name])
            self.memory = self._engine.device_memory_size_v2

    def set_memory(self, address: int, size: int) -> None:
        with self._log.explained(f"take {size} bytes to work in"):
            self._context.set_device_memory(address, size)

    def set_shapes(self, shapes: Mapping[str, Shape]) -> None:
        """Of all inputs. Raises SdaError for those the engine was not built for."""
        with self._log.explained("run inputs of these shapes"):
            for name, shape in shapes.items():
                if not self._context.set_input_shape(name, shape):
                    raise _RefusedError(f"{name} cannot be {list(shape)}")
            if missing := self._context.infer_shapes():
                raise _RefusedError(f"shapes of {', '.join(missing)} are missing")

    def tensor(self, name: str) -> tuple[Shape, torch.dtype]:
        """Shape and dtype of an input or output, once shapes are set. Raises SdaError for a dtype torch has not."""
        with self._log.explained(f"describe {name}"):
            dtype = self._engine.get_tensor_dtype(name).name
            if dtype not in _DTYPES:
                raise _RefusedError(f"its type {dtype} is none of torch's")
            return tuple(self._context.get_tensor_shape(name)), _DTYPES[dtype]

    def bind(self, name: str, address: int) -> None:
        """Where an input is read from or an output written to; the caller keeps the memory alive."""
        with self._log.explained(f"bind {name}"):
            if not self._context.set_tensor_address(name, address):
                raise _RefusedError("its address is refused")

    def enqueue(self, stream: int) -> None:
        """Start a run on a CUDA stream, by its handle; not on the default one, where TensorRT would wait for it."""
        with self._log.explained("run the engine"):
            if not self._context.execute_async_v3(stream):
                raise _RefusedError


_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
}


def _tensorrt() -> TensorRT:
    try:
        trt = cast(TensorRT, import_module("tensorrt"))
    except ImportError as error:
        raise SdaError('the trt engine needs TensorRT: pip install "sda-fast[trt]"') from error
    if _major(trt) < 10:
        raise SdaError(f'TensorRT {trt.__version__} is too old for the trt engine: pip install "sda-fast[trt]"')
    return trt


def _major(trt: TensorRT) -> int:
    return int(trt.__version__.split(".")[0])


def _parser_message(parser: OnnxParser) -> str:
    if not parser.num_errors:
        return ""
    first = parser.get_error(0)
    return f"{first.desc()} at node {first.node_name()!r}, {first.node_operator()}"


class _RefusedError(Exception):
    """A None or False of TensorRT's."""


def _required(value: T | None) -> T:
    if value is None:
        raise _RefusedError
    return value


class _Log:
    """TensorRT's log, of which errors are kept for the next SdaError."""

    def __init__(self, trt: TensorRT):
        base: Any = trt.ILogger
        severities = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)
        errors: list[str] = []

        class Logger(base):
            def __init__(self) -> None:
                base.__init__(self)  # pybind11 wants it called like this

            def log(self, severity: Any, msg: str) -> None:
                if severity in severities:
                    errors.append(msg)

        self.logger, self._errors = Logger(), errors

    @contextmanager
    def explained(self, doing: str) -> Iterator[None]:
        """Whatever fails inside is an SdaError that says what TensorRT could not do and why."""
        self._errors.clear()
        try:
            yield
        except Exception as error:
            said = [str(error), *self._errors[:1]]
            reason = " ".join("; ".join(filter(None, said)).split()) or "no reason given"
            raise SdaError(f"TensorRT could not {doing} ({reason}): use --engine inductor") from error
