"""Known truth: delays of known length put into one component of a running request."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict

import torch

from vlm_latency.instrument.intervals import DECODE
from vlm_latency.instrument.timeline import Mark
from vlm_latency.models.boundaries import (
    DECODE_FORWARD,
    ENCODER,
    PREFILL,
    PROJECTOR,
    boundaries,
)

if TYPE_CHECKING:
    from vlm_latency.models.loading import VLM

DELAYED = (ENCODER, PROJECTOR, PREFILL, DECODE)
STEP = 2  # the decode step that is delayed: of three tokens the last, so that little follows
NO_LEAD_MS = 0.1  # half of the smallest tolerance: a host spin may hide behind that much at most

# The boundary at which each component is delayed: its label, and how many came before it.
EDGES = {
    ENCODER: (ENCODER, 0),
    PROJECTOR: (PROJECTOR, 0),
    PREFILL: (PREFILL, 0),
    DECODE: (DECODE_FORWARD, STEP - 1),
}
Where = Literal["start", "end"]


class Delay(Protocol):
    """Keeps the host or the device busy for a known time.

    What counts as known is the delay's own length, taken around it: a spin may be interrupted,
    and a GPU's clock drifts.
    """

    def __call__(self, milliseconds: float) -> None:
        """Delay what follows."""

    def length_ms(self) -> float:
        """Say how long the last delay was, in milliseconds; waits for it."""


class HostSpin:
    """Occupies the host, which launches nothing meanwhile."""

    _length_ns = 0

    def __call__(self, milliseconds: float) -> None:
        start = now = time.perf_counter_ns()
        until = start + round(milliseconds * 1e6)
        while now < until:
            now = time.perf_counter_ns()
        self._length_ns = now - start

    def length_ms(self) -> float:
        return self._length_ns / 1e6


class DeviceSleep:
    """Occupies a CUDA device with a kernel that waits; the host runs on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._cycles_per_ms = 1.0
        for _ in range(3):  # clocks rise while it sleeps
            self._sleep(10_000_000)
            self._cycles_per_ms = 10_000_000 / self.length_ms()

    def __call__(self, milliseconds: float) -> None:
        self._sleep(round(milliseconds * self._cycles_per_ms))

    def length_ms(self) -> float:
        self._ends[1].synchronize()
        return float(self._ends[0].elapsed_time(self._ends[1]))

    def _sleep(self, cycles: int) -> None:
        with torch.cuda.device(self._device):
            self._ends[0].record()
            torch.cuda._sleep(cycles)
            self._ends[1].record()


def delays(device: torch.device) -> dict[str, Delay]:
    """Give the delays that a device knows, by kind: ``host``, and ``device`` on CUDA."""
    found: dict[str, Delay] = {"host": HostSpin()}
    if device.type == "cuda":
        found["device"] = DeviceSleep(device)
    return found


@contextlib.contextmanager
def delayed(
    vlm: VLM, component: str, milliseconds: float, delay: Delay, where: Where = "end"
) -> Iterator[None]:
    """Delay one component of one request meanwhile, once, at its start or end.

    The delay lies within the boundary marks, which are put around it later; at the end it does not
    disturb the component's work before it. Decode is delayed in its second step. A meter must
    attach its hooks inside this.
    """
    label, at = EDGES[component]
    calls = 0

    def act(reached: str) -> None:
        nonlocal calls
        if reached == label:
            if calls == at:
                delay(milliseconds)
            calls += 1

    def rest(_: str) -> None:
        pass

    listeners = (act, rest) if where == "start" else (rest, act)
    with boundaries(vlm.model, vlm.components, *listeners):
        yield


def leads(host: Sequence[Mark], device: Sequence[Mark] | None) -> list[float]:
    """Say how far the host was ahead of the device at every mark, in milliseconds.

    Both clocks start at the first mark, where the device is idle. About zero says that the device
    was waiting for the host; without a device clock nothing is ever ahead.

    >>> host = [Mark(0, "a", True), Mark(2_000_000, "a", False)]
    >>> leads(host, [Mark(50, "a", True), Mark(9_000_050, "a", False)])
    [0.0, 7.0]
    """
    if device is None:
        return [0.0] * len(host)
    return [
        (d.time_ns - device[0].time_ns - (h.time_ns - host[0].time_ns)) / 1e6
        for h, d in zip(host, device, strict=True)
    ]


class Regime(TypedDict):
    """How far the host is ahead in a component, and which delays add up there; see `regime`."""

    start_ms: float
    end_ms: float
    cases: list[list[Any]]
    hides_launches: bool


def regime(marks: Sequence[Mark], lead_ms: Sequence[float], component: str) -> Regime:
    """Decide which delays add up in a component.

    A spin of the host adds its whole length where the device waits for the host (no lead), and
    hides behind the device's work elsewhere. A sleep of the device adds its whole length to the
    component that it ends; what follows is not shortened by it only where the host stays ahead up
    to the end of that forward, since the host goes on launching while the device sleeps.

    Parameters
    ----------
    marks, lead_ms
        Of one request; see `leads`.

    Returns
    -------
    dict
        ``start_ms`` and ``end_ms``, the leads there; ``cases``: kind and place of each;
        ``hides_launches``: whether a sleep at the end would shorten what follows.

    Examples
    --------
    >>> edges = [Mark(0, "T_LLM_prefill", True), Mark(1, "T_LLM_prefill", False)]
    >>> regime(edges, [0.0, 0.02], "T_LLM_prefill")["cases"]
    [['host', 'end']]
    >>> regime(edges, [0.0, 8.0], "T_LLM_prefill")["cases"]
    [['device', 'end'], ['host', 'start']]
    """
    label, at = EDGES[component]

    def position(opens: bool) -> int:
        same = [i for i, mark in enumerate(marks) if (mark.label, mark.opens) == (label, opens)]
        return same[at]

    first, last = position(True), position(False)
    forward = DECODE_FORWARD if component == DECODE else PREFILL
    ends = [i for i, mark in enumerate(marks) if mark.label == forward and not mark.opens]
    until = next(i for i in ends if i >= last)
    start, end = lead_ms[first], lead_ms[last]
    cases = [["host", "end"]]
    if end > NO_LEAD_MS:
        cases = [["device", "end"], *([["host", "start"]] if start <= NO_LEAD_MS else [])]
    return {
        "start_ms": start,
        "end_ms": end,
        "cases": cases,
        "hides_launches": end > NO_LEAD_MS and min(lead_ms[last : until + 1]) <= NO_LEAD_MS,
    }


@contextlib.contextmanager
def replayed_encoder(vlm: VLM, run: Callable[[], object]) -> Iterator[bool]:
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
    outputs: list[object] = []
    handle = encoder.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        run()
    finally:
        handle.remove()
    turn = 0

    @functools.wraps(encoder.forward)
    def forward(*_: object, **__: object) -> object:
        nonlocal turn
        turn += 1
        return outputs[(turn - 1) % len(outputs)]

    encoder.forward = forward
    try:
        yield True
    finally:
        del encoder.forward
