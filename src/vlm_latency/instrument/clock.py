"""Clocks that can be read inside a timed region without disturbing it.

A clock stamps numbered slots, allocated beforehand, and gives all of them afterwards. The host
clock reads ``perf_counter_ns``; the CUDA clock records an event on the current stream and waits
for nothing until the end, so that the device never idles for the sake of the measurement.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch


class Clock(Protocol):
    """What a timeline asks of a clock."""

    def reserve(self, slots: int) -> None:
        """Have at least this many slots; called outside the timed region."""

    def stamp(self, slot: int) -> None:
        """Note the present time in a slot."""

    def synchronize(self) -> None:
        """Wait until everything that was stamped has happened."""

    def read(self, slots: int) -> list[int]:
        """Give the times of the first ``slots`` slots in nanoseconds, from any fixed origin."""


class HostClock:
    """The host's monotonic clock, in nanoseconds.

    Parameters
    ----------
    now
        Where the time comes from; tests put a fake one here.
    """

    def __init__(self, now: Callable[[], int] = time.perf_counter_ns) -> None:
        self._now = now
        self._times: list[int] = []

    def reserve(self, slots: int) -> None:
        self._times.extend([0] * (slots - len(self._times)))

    def stamp(self, slot: int) -> None:
        self._times[slot] = self._now()

    def synchronize(self) -> None:
        pass

    def read(self, slots: int) -> list[int]:
        return self._times[:slots]


class CudaClock:
    """Timing events on a CUDA device's current stream, nanoseconds from the first of them.

    CUDA gives the time between two events as float32 milliseconds, which is 8 us coarse after two
    minutes. Times are therefore sums of the differences between neighbours, each exact to its own
    length.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._events: list[torch.cuda.Event] = []

    def reserve(self, slots: int) -> None:
        import torch

        self._stream = torch.cuda.current_stream(self._device)
        for _ in range(slots - len(self._events)):
            event = torch.cuda.Event(enable_timing=True)
            event.record(self._stream)  # the driver makes an event when it is first recorded
            self._events.append(event)

    def stamp(self, slot: int) -> None:
        self._events[slot].record(self._stream)

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize(self._device)

    def read(self, slots: int) -> list[int]:
        pairs = itertools.pairwise(self._events[:slots])
        steps = (round(before.elapsed_time(after) * 1e6) for before, after in pairs)
        return list(itertools.accumulate(steps, initial=0))[:slots]


def resolution_ns(reads: int = 20_000) -> dict[str, float]:
    """Measure the host clock: the smallest step it shows and the median cost of one reading.

    Returns
    -------
    dict
        ``smallest_step_ns`` and ``median_step_ns`` of successive readings, nanoseconds.
    """
    now = time.perf_counter_ns
    times = np.array([now() for _ in range(reads)])
    steps = np.diff(times)
    return {
        "smallest_step_ns": float(steps[steps > 0].min()),
        "median_step_ns": float(np.median(steps)),
    }
