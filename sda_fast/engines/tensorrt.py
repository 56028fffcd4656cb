"""The trt engine: TensorRT builds a step's ONNX file into a plan for one kind of GPU, which is kept for later runs."""

import hashlib
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from sda_fast import __version__
from sda_fast.engines import onnx_export, tensorrt_api
from sda_fast.engines.base import preparing, versions
from sda_fast.engines.cache import EngineCache, default_folder
from sda_fast.engines.onnx_export import PortableGraph, portable_graph, write_onnx
from sda_fast.engines.steps import Step
from sda_fast.engines.tensorrt_api import BuildOptions, Execution
from sda_fast.engines.tensorrt_protocol import Shape
from sda_fast.errors import SdaError

Profiles = dict[str, tuple[Shape, Shape, Shape]]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TensorRTEngine:
    """Everything runs in the dtypes of the step's weights and activations, nothing in TF32.

    cache_dir: where built engines are kept, `cache.default_folder()` if None. builder_optimization_level: 0 to 5, more
    time spent on building for faster engines. workspace_bytes: what a layer may take besides its tensors, None for all
    there is. timing_cache: keep what builds have timed, for later ones on the same GPU. hardware_compatible: an engine
    for every GPU since Ampere, slower. profile: least, usual and greatest batch of one engine for many batch sizes;
    None builds one for each. cuda_graphs: replay a run as one CUDA graph.
    """

    cache_dir: Path | None = None
    builder_optimization_level: int = 3
    workspace_bytes: int | None = None
    timing_cache: bool = True
    hardware_compatible: bool = False
    profile: tuple[int, int, int] | None = None
    cuda_graphs: bool = True
    name = "trt"

    def check(self, step: Step, device: torch.device) -> None:
        tensorrt_api.version()  # first, as it says what to install
        Gpu(device)

    def prepare(self, step: Step, example: tuple[Tensor, ...]) -> "TensorRTProgram":
        """Raises SdaError without TensorRT or a GPU, for a batch outside of the profile, and if the build fails."""
        tensorrt_api.version()  # first, as it says what to install
        gpu = Gpu(example[0].device)
        profiles = self._profiles(step, len(example[0]))
        with preparing(self.name), gpu.current():
            execution, size = self._load_or_build(step, None if profiles else len(example[0]), profiles, gpu)
            return TensorRTProgram(self, step, example, execution, size, gpu)

    def _profiles(self, step: Step, batch: int) -> Profiles:
        """Of the inputs that grow with the batch; none for a static batch."""
        if self.profile is None:
            return {}
        least, usual, greatest = self.profile
        if not 1 <= least <= usual <= greatest:
            raise SdaError(f"profile {self.profile} must be the least, usual and greatest batch, in this order")
        if not least <= batch <= greatest:
            raise SdaError(f"batch {batch} is outside of the profile {self.profile}: change one of them")
        one, two = step.example(1), step.example(2)
        growing = [x.shape != y.shape for x, y in zip(one, two, strict=True)]
        shapes = [[tuple(x.shape) for x in step.example(n)] for n in self.profile]
        of_inputs = zip(step.inputs, growing, *shapes, strict=True)
        return {name: (low, mid, high) for name, grows, low, mid, high in of_inputs if grows}

    def _settings(self, portable: PortableGraph, precision: str, profiles: Profiles, gpu: "Gpu") -> dict[str, Any]:
        """All that a plan depends on.

        Of the step that is its traced graph, which takes seconds where the ONNX file takes minutes, and what makes the
        file of it.
        """
        machine = gpu.identity()
        if self.hardware_compatible:
            machine = {"driver": machine["driver"], "cuda": machine["cuda"]}
        return {
            "kind": "plan",
            "graph": graph_hash(portable.graph),
            "inputs": {
                name: [list(x.shape), str(x.dtype)] for name, x in zip(portable.inputs, portable.example, strict=True)
            },
            "outputs": list(portable.outputs),
            "precision": precision,
            "exporter": hashlib.sha256(Path(onnx_export.__file__).read_bytes()).hexdigest(),
            "sda_fast": __version__,
            **_exporter_versions(),
            "tensorrt": tensorrt_api.version(),
            **machine,
            "flags": tensorrt_api.FLAGS,
            "profiles": {name: [list(shape) for shape in shapes] for name, shapes in profiles.items()},
            "builder_optimization_level": self.builder_optimization_level,
            "workspace_bytes": self.workspace_bytes,
            "hardware_compatible": self.hardware_compatible,
        }

    def _load_or_build(self, step: Step, batch: int | None, profiles: Profiles, gpu: "Gpu") -> tuple[Execution, int]:
        """The loaded plan and its size."""
        cache = EngineCache(self.cache_dir or default_folder())
        traced = [portable_graph(step, batch)]
        settings = self._settings(traced[0], step.precision, profiles, gpu)

        def build(work: Path) -> bytes:
            write_onnx(traced.pop(), work / "step.onnx")  # its weights are freed before the builder takes its memory
            return self._build(cache, settings, work / "step.onnx", profiles)

        plan = cache.obtain(settings, build)
        try:
            return Execution(plan), len(plan)
        except SdaError as error:
            if not traced:  # it has just been built
                raise
            logger.warning("%s; the engine in %s is built again", error, cache.folder)
        plan = cache.obtain(settings, build, refused=plan)
        return Execution(plan), len(plan)

    def _build(self, cache: EngineCache, settings: dict[str, Any], onnx: Path, profiles: Profiles) -> bytes:
        timing_settings = {"kind": "timings", **{key: settings.get(key) for key in ("tensorrt", "gpu")}}
        earlier = (cache.find(timing_settings) or b"") if self.timing_cache else None
        options = BuildOptions(
            optimization_level=self.builder_optimization_level,
            workspace_bytes=self.workspace_bytes,
            hardware_compatible=self.hardware_compatible,
            profiles=profiles,
            timing_cache=earlier,
        )
        plan, timings = tensorrt_api.build(onnx, options)
        if timings:
            cache.store(timing_settings, timings)
        return plan


class TensorRTProgram:
    """Inputs are copied to where the engine reads them, outputs lie where it writes them."""

    def __init__(
        self,
        engine: TensorRTEngine,
        step: Step,
        example: tuple[Tensor, ...],
        execution: Execution,
        plan_bytes: int,
        gpu: "Gpu",
    ):
        self._engine, self._precision, self._execution, self._gpu = engine, step.precision, execution, gpu
        device = example[0].device
        execution.set_shapes({name: tuple(x.shape) for name, x in zip(step.inputs, example, strict=True)})

        def tensor(name: str) -> Tensor:
            shape, dtype = execution.tensor(name)
            made = torch.empty(shape, dtype=dtype, device=device)
            execution.bind(name, made.data_ptr())
            return made

        # torch's own memory for all of it: it is shared with the rest of the program, and its lack is torch's error.
        self._inputs, self._outputs = tuple(map(tensor, step.inputs)), tuple(map(tensor, step.outputs))
        self._work = torch.empty(max(execution.memory, 1), dtype=torch.uint8, device=device)
        execution.set_memory(self._work.data_ptr(), execution.memory)
        own = sum(x.nbytes for x in (*self._inputs, *self._outputs))
        self._memory = execution.memory + plan_bytes + own
        self._start: Callable[[int], None] = execution.enqueue
        self.run(*example)  # TensorRT does the last of its preparations in the first run, which cannot be captured
        if engine.cuda_graphs:
            self._start = gpu.capture(execution.enqueue)

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with self._gpu.queue() as stream:
            for own, given in zip(self._inputs, inputs, strict=True):
                if own.shape != given.shape:
                    raise SdaError(
                        f"this program takes inputs of {list(own.shape)}, not {list(given.shape)}: prepare another"
                    )
                own.copy_(given)
            self._start(stream)
        return self._outputs

    def memory_needed(self) -> int:
        return self._memory

    def describe(self) -> dict[str, Any]:
        settings = {f.name: getattr(self._engine, f.name) for f in fields(self._engine) if f.name != "cache_dir"}
        names = {"engine": "trt", "precision": self._precision, "tensorrt": tensorrt_api.version()}
        return {**names, **settings, **versions()}


class Gpu:
    """The device: what a plan depends on of it, and a stream of the engine's own."""

    def __init__(self, device: torch.device):
        """Raises SdaError for what is no NVIDIA GPU."""
        if device.type != "cuda":
            raise SdaError(
                f"the trt engine runs on an NVIDIA GPU, not on {device}: give --device cuda or --engine inductor"
            )
        self._device, self._stream = device, torch.cuda.Stream(device)

    def identity(self) -> dict[str, str]:
        properties = torch.cuda.get_device_properties(self._device)
        return {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": str(properties.multi_processor_count),  # part of a GPU has the name of the whole
            "driver": _driver(),
            "cuda": str(torch.version.cuda).split(".")[0],
        }

    @contextmanager
    def current(self) -> Iterator[None]:
        """TensorRT builds and loads for the current device, with memory that torch does not hold."""
        with torch.cuda.device(self._device):
            torch.cuda.empty_cache()
            yield

    @contextmanager
    def queue(self) -> Iterator[int]:
        """Makes a private stream torch's current one and gives its handle: it starts after what the caller has queued,
        and what the caller queues next starts after it. On the default stream TensorRT would wait for each run."""
        outside = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            yield self._stream.cuda_stream
        outside.wait_stream(self._stream)

    def capture(self, enqueue: Callable[[int], None]) -> Callable[[int], None]:
        """`enqueue` as one CUDA graph, replayed on the current stream."""
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                enqueue(self._stream.cuda_stream)
        except (RuntimeError, SdaError) as error:
            raise SdaError(f"the engine cannot be captured as a CUDA graph ({error}): use cuda_graphs=False") from error
        return lambda stream: graph.replay()


def graph_hash(graph: fx.GraphModule) -> str:
    """Of the graph's code and of dtype, shape and content of every constant; the same on each GPU of a machine."""
    found = hashlib.sha256(re.sub(r"cuda:\d+", "cuda", graph.code).encode())
    for name in sorted({node.target for node in graph.graph.find_nodes(op="get_attr")}):
        value = getattr(graph, name).detach().contiguous()
        found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy(force=True))
    return found.hexdigest()


def _exporter_versions() -> dict[str, str]:
    try:
        return {name: version(name) for name in ("torch", "onnx", "onnx_ir", "onnxscript")}
    except PackageNotFoundError as error:
        raise SdaError(f'the trt engine needs {error.name}: pip install "sda-fast[trt]"') from error


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except OSError:  # not Linux, or hidden in a container
        return ""
