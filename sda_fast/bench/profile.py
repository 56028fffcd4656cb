"""Where the time of a call goes, kernel by kernel."""

from collections.abc import Callable
from typing import Any

from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from sda_fast.bench.measure import wait

KERNELS = 20  # the rest is added up


def profile_kernels(call: Callable[[], Any], device: str) -> list[dict[str, Any]]:
    """{"name", "calls", "seconds"} of the KERNELS kernels on which one call spends most, and of the rest together.

    On a GPU kernels are what the device runs, on a CPU the operators, each less what it calls. The profiler's own cost
    is in the seconds, so many small kernels weigh more than in a run by itself.
    """
    gpu = device != "cpu"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as profiler:
        call()
        wait(device)
    found = [
        {"name": event.key, "calls": event.count, "seconds": _microseconds(event, gpu) / 1e6}
        for event in profiler.key_averages()
        if (event.device_type == DeviceType.CUDA) == gpu
        and _microseconds(event, gpu) > 0
        # A compiled call is shown again as a whole, beside its kernels.
        and not event.is_user_annotation
    ]
    found.sort(key=lambda kernel: -kernel["seconds"])
    kept, rest = found[:KERNELS], found[KERNELS:]
    if rest:
        total = {name: sum(kernel[name] for kernel in rest) for name in ("calls", "seconds")}
        kept.append({"name": f"{len(rest)} others", **total})
    return kept


def _microseconds(event: Any, gpu: bool) -> float:
    return event.self_device_time_total if gpu else event.self_cpu_time_total
