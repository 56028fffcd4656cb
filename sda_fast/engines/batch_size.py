"""How many images a step may take at once on this machine."""

import os

import torch

from sda_fast.engines.memory import needed_bytes
from sda_fast.engines.steps import Step
from sda_fast.errors import SdaError
from sda_fast.host_memory import release_freed_memory

# As CUDA, PyTorch on the CPU, the C++ library, cuDNN and cuBLAS, and ONNX Runtime's arena say it.
_OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "bad_alloc",
    "alloc_failed",
    "failed to allocate memory",
)


def affordable_batch(step: Step, engine: str, processes: int = 1, most: int = 64) -> int:
    """How many images a run of the step on that engine may take at once: the largest power of two up to `most` whose
    activations fill four fifths of a process's share of the memory that is free on the step's device; at least one."""
    example = step.example(2)
    needed = needed_bytes(step, example, engine) / 2
    if example[0].is_cuda:
        free, _ = torch.cuda.mem_get_info(example[0].device)
    else:
        release_freed_memory()
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    batch = most
    while batch > 1 and batch * needed > 0.8 * free / processes:
        batch //= 2
    return batch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the CPU: most libraries only say so."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    told = str(error).lower()
    return any(words in told for words in _OUT_OF_MEMORY)


def smaller_batch(size: int, error: Exception, unit: int = 1) -> int:
    """What to try after memory ran out for `size` images: half, as a multiple of `unit`, but at least one `unit`.

    Raises SdaError, from `error`, where there is nothing smaller.
    """
    half = max(1, size // 2 // unit) * unit
    if half >= size:
        raise SdaError(
            f"there is not enough memory for {size} image{'s' * (size > 1)} at a time: use a lower precision or a "
            "device with more memory"
        ) from error
    return half
