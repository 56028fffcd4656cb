"""The part of TensorRT's Python interface that `tensorrt_api` calls, for the type checker, as TensorRT has no types.

Every name and signature here is the same in 10.12 and later and in 11. A result of None or False is a failure;
constructors raise TypeError.
"""

from __future__ import annotations

from typing import Any, Protocol

Shape = tuple[int, ...]


class Profile(Protocol):
    def set_shape(self, input: str, min: Shape, opt: Shape, max: Shape) -> None: ...


class Memory(Protocol):
    """Bytes of TensorRT's own."""

    def __buffer__(self, flags: int, /) -> memoryview: ...


class TimingCache(Protocol):
    def serialize(self) -> Memory | None: ...


class BuilderConfig(Protocol):
    builder_optimization_level: int
    hardware_compatibility_level: Any

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None: ...
    def clear_flag(self, flag: Any) -> None: ...
    def add_optimization_profile(self, profile: Profile) -> int: ...
    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache | None: ...
    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool: ...
    def get_timing_cache(self) -> TimingCache | None: ...


class Network(Protocol): ...


class Builder(Protocol):
    def create_network(self, flags: int) -> Network | None: ...
    def create_builder_config(self) -> BuilderConfig | None: ...
    def create_optimization_profile(self) -> Profile | None: ...
    def build_serialized_network(self, network: Network, config: BuilderConfig) -> Memory | None: ...


class ParserError(Protocol):
    def desc(self) -> str: ...
    def node_name(self) -> str: ...
    def node_operator(self) -> str: ...


class OnnxParser(Protocol):
    @property
    def num_errors(self) -> int: ...
    def parse_from_file(self, model: str) -> bool: ...
    def get_error(self, index: int) -> ParserError: ...


class Context(Protocol):
    def set_device_memory(self, memory: int, size: int) -> None: ...
    def set_input_shape(self, name: str, shape: Shape) -> bool: ...
    def infer_shapes(self) -> list[str]: ...
    def get_tensor_shape(self, name: str) -> Shape: ...
    def set_tensor_address(self, name: str, memory: int) -> bool: ...
    def execute_async_v3(self, stream_handle: int) -> bool: ...


class Engine(Protocol):
    @property
    def num_io_tensors(self) -> int: ...
    @property
    def device_memory_size_v2(self) -> int: ...
    def get_tensor_name(self, index: int) -> str: ...
    def get_tensor_mode(self, name: str) -> Any: ...
    def get_tensor_dtype(self, name: str) -> Any: ...
    def create_execution_context(self, strategy: Any) -> Context | None: ...


class Runtime(Protocol):
    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None: ...


class Severity(Protocol):
    INTERNAL_ERROR: Any
    ERROR: Any


class LoggerClass(Protocol):
    Severity: Severity


class NetworkFlag(Protocol):
    STRONGLY_TYPED: Any


class BuilderFlag(Protocol):
    TF32: Any


class Pool(Protocol):
    WORKSPACE: Any


class Compatibility(Protocol):
    AMPERE_PLUS: Any


class Allocation(Protocol):
    USER_MANAGED: Any


class Mode(Protocol):
    INPUT: Any


class TensorRT(Protocol):
    """The module `tensorrt`."""

    __version__: str
    ILogger: LoggerClass
    NetworkDefinitionCreationFlag: NetworkFlag
    BuilderFlag: BuilderFlag
    MemoryPoolType: Pool
    HardwareCompatibilityLevel: Compatibility
    ExecutionContextAllocationStrategy: Allocation
    TensorIOMode: Mode

    def Builder(self, logger: Any) -> Builder: ...
    def OnnxParser(self, network: Network, logger: Any) -> OnnxParser: ...
    def Runtime(self, logger: Any) -> Runtime: ...
