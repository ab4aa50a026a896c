"""What tells a noisy neighbour from a slow model: interruptions, stolen time, the GPU's state."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_latency.records import Row

if TYPE_CHECKING:
    import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

STAT = Path("/proc/stat")
SECONDS_BETWEEN_GPU_SAMPLES = 1.0
CANARY_STEPS = 1500  # about 0.1 ms of plain Python

# NVML's bits for clocks below what was asked for, without those of an idle GPU or a chosen clock.
THROTTLE_REASONS = {
    0x04: "sw_power_cap",
    0x08: "hw_slowdown",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
}


def host_canary_ms() -> float:
    """Time a fixed piece of work on the host: how fast the host is right now, in milliseconds."""
    start = time.perf_counter_ns()
    value = 1
    for _ in range(CANARY_STEPS):
        value = value * 1103515245 + 12345 & 0x7FFFFFFF
    return (time.perf_counter_ns() - start) / 1e6


class QuietHost:
    """Waits until the host is about as quick as it has been at best, for a limited time.

    On a shared machine a host that launches the GPU's work is slow for seconds at a time. Waiting
    removes no run: how long it took is in the record, and a host that stays slow is measured.
    """

    QUICK = 1.3  # times the quickest canary so far; it varies by some 10 %

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._best = float("inf")

    def wait(self) -> tuple[float, float]:
        """Give the canary right before the run and the time waited for it, milliseconds."""
        start = time.perf_counter()
        while True:
            canary_ms = host_canary_ms()
            self._best = min(self._best, canary_ms)
            waited = time.perf_counter() - start
            if canary_ms <= self.QUICK * self._best or waited >= self._seconds:
                return canary_ms, waited * 1e3 if self._seconds else 0.0


class NoiseProbe:
    """Counts what disturbed the process between ``start`` and ``stop``.

    Involuntary context switches are those of all threads of the process. Steal is the time that
    a hypervisor gave to others, over all cores; Linux counts it in ticks of some 10 ms.
    """

    def __init__(self) -> None:
        self._stat = os.open(STAT, os.O_RDONLY) if STAT.exists() else None
        self._tick_ms = 0.0 if self._stat is None else 1e3 / os.sysconf("SC_CLK_TCK")
        self._switches: int | None = None
        self._steal: float | None = None

    def start(self) -> None:
        self._switches = _switches()
        self._steal = self._steal_ms()

    def stop(self) -> Row:
        """Give the record's ``involuntary_switches`` and ``steal_ms``; None where unknown."""
        return {
            "involuntary_switches": _since(self._switches, _switches()),
            "steal_ms": _since(self._steal, self._steal_ms()),
        }

    def close(self) -> None:
        if self._stat is not None:
            os.close(self._stat)
            self._stat = None

    def _steal_ms(self) -> float | None:
        if self._stat is None:
            return None
        fields = os.pread(self._stat, 256, 0).split(b"\n", 1)[0].split()
        return int(fields[8]) * self._tick_ms


def _switches() -> int | None:
    return None if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _since(before: float | None, now: float | None) -> float | None:
    return None if before is None or now is None else now - before


class GpuProbe:
    """Clock, temperature, power and throttling of the measuring GPU, through NVML.

    Sampled between runs, never within one, at most once a second; every run carries the last
    sample. Without an NVIDIA GPU all values are None.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._handle = _nvml_handle(device)
        self._last = dict.fromkeys(
            ("sm_clock_mhz", "gpu_temperature_c", "gpu_power_w", "throttle_reasons")
        )
        self._at = float("-inf")

    def sample(self) -> Row:
        """Give the record's columns of the GPU's state."""
        if self._handle is not None and time.monotonic() - self._at > SECONDS_BETWEEN_GPU_SAMPLES:
            self._last = self._read()
            self._at = time.monotonic()
        return self._last

    def _read(self) -> Row:
        import pynvml as nvml

        handle = self._handle
        values: Row = {}
        readings = {
            "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "gpu_temperature_c": lambda: nvml.nvmlDeviceGetTemperature(
                handle, nvml.NVML_TEMPERATURE_GPU
            ),
            "gpu_power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "throttle_reasons": lambda: _reasons(
                nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
            ),
        }
        for name, read in readings.items():
            values[name] = None
            with contextlib.suppress(nvml.NVMLError):  # a card need not tell everything
                values[name] = read()
        return values


def _reasons(bits: int) -> str:
    return ",".join(name for bit, name in THROTTLE_REASONS.items() if bits & bit)


def _nvml_handle(device: torch.device | str) -> object:
    """Find the GPU by its UUID: NVML's numbers know nothing of CUDA_VISIBLE_DEVICES."""
    if getattr(device, "type", None) != "cuda":
        return None
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except Exception:  # no driver library, no permission: the run goes on without the GPU's state
        return None
