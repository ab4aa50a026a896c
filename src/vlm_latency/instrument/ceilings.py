"""What a device can do at most: a large matrix product, a large copy, the cost of a launch.

The roofline model's two roofs and its launch term, measured where the model runs, in its dtype
and with its number of threads (Williams, Waterman and Patterson 2009).
"""

from __future__ import annotations

import contextlib
import math
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from vlm_latency.statistics import percentile

if TYPE_CHECKING:
    import torch

MATMUL_SIZES = (256, 512, 1024, 2048, 4096, 8192)
MATMUL_SECONDS = 0.01  # the smallest size that takes so long, or the largest
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}  # several times the last-level cache
LAUNCHES = 1000
FEWEST_SAMPLES = 5
# A ceiling is what the device reaches when nothing disturbs it: nine runs of ten are slower.
CEILING_PERCENTILE = 90.0


def ceilings(
    device: torch.device | str, dtype: str, threads: int, seconds: float
) -> dict[str, object]:
    """Measure the roofs of the roofline model on a device.

    Parameters
    ----------
    device
        A ``torch.device`` or its name.
    dtype
        Of the matrix product, such as ``bfloat16``.
    threads
        CPU threads.
    seconds
        About how long to measure, in equal parts.

    Returns
    -------
    dict
        ``flops_per_s`` (2·n³ per product of n × n matrices), ``bytes_per_s`` (read plus written),
        ``launch_overhead_us`` (one small operation among many); ``intervals`` holds each as an
        estimate; ``device, device_name, dtype, threads, measured_at, matmul_size, copy_bytes``.
    """
    import torch

    device = torch.device(device)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode(), _current(device):
            size, flops = _matmul(device, getattr(torch, dtype), seconds / 3)
            copied, moved = _copy(device, seconds / 3)
            launches = _launch(device, seconds / 3)
    finally:
        torch.set_num_threads(before)
    estimates = {
        "flops_per_s": percentile(flops, CEILING_PERCENTILE),
        "bytes_per_s": percentile(moved, CEILING_PERCENTILE),
        "launch_overhead_us": percentile(launches, 50),
    }
    on_cuda = device.type == "cuda"
    return {
        **{name: estimate.value for name, estimate in estimates.items()},
        "intervals": {name: estimate.to_dict() for name, estimate in estimates.items()},
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if on_cuda else platform.machine(),
        "dtype": dtype,
        "threads": threads,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "matmul_size": size,
        "copy_bytes": copied,
    }


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a GPU the one whose stream and events are meant."""
    import torch

    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _matmul(device: torch.device, dtype: torch.dtype, seconds: float) -> tuple[int, list[float]]:
    """Samples of FLOP/s, on random numbers: a GPU multiplies zeros faster."""
    import torch

    for size in MATMUL_SIZES:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)

        def multiply(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
            torch.mm(a, b, out=out)

        multiply()
        if _time(multiply, device) >= MATMUL_SECONDS:
            break
    return size, [2 * size**3 / t for t in _samples(multiply, device, seconds)]


def _copy(device: torch.device, seconds: float) -> tuple[int, list[float]]:
    """Samples of bytes per second, read and written."""
    import torch

    count = COPY_BYTES[device.type]
    source = torch.ones(count // 4, device=device)
    target = torch.empty_like(source)
    times = _samples(lambda: target.copy_(source), device, seconds)
    return count, [2 * count / t for t in times]


def _launch(device: torch.device, seconds: float) -> list[float]:
    """Samples of microseconds per small operation, many of them queued one after the other."""
    import torch

    value = torch.zeros(1, device=device)

    def launch() -> None:
        for _ in range(LAUNCHES):
            value.add_(1)

    return [1e6 * t / LAUNCHES for t in _samples(launch, device, seconds)]


def _samples(function: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Time a function for about so long, after half as long again of warming up."""
    end = time.perf_counter() + seconds / 3
    _time(function, device)
    while time.perf_counter() < end:
        _time(function, device)
    samples: list[float] = []
    end = time.perf_counter() + seconds * 2 / 3
    while time.perf_counter() < end or len(samples) < FEWEST_SAMPLES:
        samples.append(_time(function, device))
    return samples


def _time(function: Callable[[], object], device: torch.device) -> float:
    """Seconds, the device idle at both ends."""
    import torch

    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return max(time.perf_counter() - start, math.ulp(1.0))
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    function()
    end_event.record()
    torch.cuda.synchronize(device)
    return float(start_event.elapsed_time(end_event)) / 1e3
