"""Known truth: delays of known length put into one component of a running request."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vlm_latency.instrument.methods import DECODE
from vlm_latency.models.boundaries import (
    DECODE_FORWARD,
    ENCODER,
    PREFILL,
    PROJECTOR,
    boundaries,
)

COMPONENTS = (ENCODER, PROJECTOR, PREFILL, DECODE)
STEP = 2  # the decode step that is delayed: of three tokens the last, so that little follows


class Delay:
    """Keeps the device busy for a known time: a spin on a CPU, a sleep kernel on CUDA.

    What counts as known is the delay's own length, taken around it: a spin may be interrupted,
    and a GPU's clock drifts.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_cuda = device.type == "cuda"
        if self._on_cuda:
            self._ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._cycles_per_ms = 1.0
            for _ in range(3):  # clocks rise while it sleeps
                self._sleep(10_000_000)
                self._cycles_per_ms = 10_000_000 / self.length_ms()
        else:
            self._length_ns = 0

    def __call__(self, milliseconds: float) -> None:
        if self._on_cuda:
            self._sleep(round(milliseconds * self._cycles_per_ms))
            return
        start = time.perf_counter_ns()
        until = start + round(milliseconds * 1e6)
        now = start
        while now < until:
            now = time.perf_counter_ns()
        self._length_ns = now - start

    def length_ms(self) -> float:
        """How long the last one was, in milliseconds; waits for it."""
        if self._on_cuda:
            self._ends[1].synchronize()
            return float(self._ends[0].elapsed_time(self._ends[1]))
        return self._length_ns / 1e6

    def _sleep(self, cycles: int) -> None:
        with torch.cuda.device(self._device):
            self._ends[0].record()
            torch.cuda._sleep(cycles)
            self._ends[1].record()


@contextlib.contextmanager
def delayed(vlm: Any, component: str, milliseconds: float, delay: Delay) -> Iterator[None]:
    """Delay one component of one request meanwhile, once.

    The delay ends the component: it lies within the boundary marks, which are put around it later,
    and does not disturb the work before it. Decode is delayed in its second step. A meter must
    attach its hooks inside this.
    """
    label, at = {
        ENCODER: (ENCODER, 0),
        PROJECTOR: (PROJECTOR, 0),
        PREFILL: (PREFILL, 0),
        DECODE: (DECODE_FORWARD, STEP - 1),
    }[component]
    calls = 0

    def act(closed: str) -> None:
        nonlocal calls
        if closed == label:
            if calls == at:
                delay(milliseconds)
            calls += 1

    with boundaries(vlm.model, vlm.components, lambda _: None, act):
        yield


@contextlib.contextmanager
def replayed_encoder(vlm: Any, run: Callable[[], Any]) -> Iterator[bool]:
    """Let the encoder repeat what it returned in ``run()``, without computing it again.

    An encoder that works for 70 ms jitters by more than the 0.2 ms that are to be recovered; one
    that repeats itself takes no time, and its hooks, marks and everything around it stay.

    Yields
    ------
    bool
        Whether it is so: not where the projector lies inside the encoder.
    """
    encoder = vlm.components.vision_encoder
    if vlm.components.mergers:
        yield False
        return
    outputs: list[Any] = []
    handle = encoder.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        run()
    finally:
        handle.remove()
    turn = 0

    @functools.wraps(encoder.forward)
    def forward(*_: Any, **__: Any) -> Any:
        nonlocal turn
        turn += 1
        return outputs[(turn - 1) % len(outputs)]

    encoder.forward = forward
    try:
        yield True
    finally:
        del encoder.forward
