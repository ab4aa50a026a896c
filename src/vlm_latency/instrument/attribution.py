"""Attribute the kernels and operators of one profiled request to its components.

Everything here is a function of the events of a Chrome trace, as ``torch.profiler`` exports it
(https://docs.pytorch.org/docs/stable/profiler.html): no device, no model and no clock is asked.

On CUDA a kernel belongs to the component during which the host launched it: its ``correlation`` is
that of the launching call (``cudaLaunchKernel``, ``cuLaunchKernelEx``, ``cudaGraphLaunch``, whose
kernels all carry its number). On a CPU the operators are the work themselves.
"""

from __future__ import annotations

import bisect
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm_latency.instrument.intervals import DECODE, with_decode
from vlm_latency.instrument.timeline import Mark, Span, spans
from vlm_latency.models.boundaries import DECODE_FORWARD
from vlm_latency.records import COMPONENTS

Event = Mapping[str, Any]

MARK = "vlm_latency."  # a boundary's annotation: this, "open" or "close", a space, the label
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHERS = ("cuda_runtime", "cuda_driver")
WAITS = re.compile(r"Synchronize")  # calls in which the host waits for the device
LARGEST = 5
# Names of kernels (CUDA) and operators (CPU) that compute attention, fused ones first.
ATTENTION = {
    "cudnn": re.compile(r"cudnn.*(sdpa|flash|fprop)|sdpa.*cudnn", re.IGNORECASE),
    "flash": re.compile(r"flash_fwd|flash_attention|pytorch_flash", re.IGNORECASE),
    "efficient": re.compile(r"fmha_cutlass|efficient_attention|mem_eff", re.IGNORECASE),
    "math": re.compile(r"softmax", re.IGNORECASE),
}
FUSED = ("cudnn", "flash", "efficient")


@dataclass(frozen=True)
class Work:
    """One kernel, copy or operator.

    Attributes
    ----------
    name
        As the trace calls it.
    start_us, end_us
        When it ran, in the trace's microseconds.
    launched_us
        When the host asked for it: of an operator, its start.
    own_us
        Its length without that of operators within it.
    outermost
        Whether it lies within no other one; a kernel always does so.
    """

    name: str
    start_us: float
    end_us: float
    launched_us: float
    own_us: float
    outermost: bool = True


@dataclass
class Share:
    """What one component did in a profiled request; times in milliseconds.

    Attributes
    ----------
    busy_ms
        How long the device computed: the union of its kernels, which may overlap.
    work_ms
        The sum of its kernels.
    kernels
        How many they are; on a CPU, operators that lie in no other one.
    host_ms
        How long the host was in the component, slowed by the profiler.
    waiting_ms
        For how much of that the host waited for the device.
    largest
        The five names that took most of ``work_ms``: name, ms, share, count.
    attention
        Backends that computed attention: ``cudnn``, ``flash``, ``efficient`` or ``math``, the one
        that took most first; empty where nothing looks like attention.
    """

    busy_ms: float = 0.0
    work_ms: float = 0.0
    kernels: int = 0
    host_ms: float = 0.0
    waiting_ms: float = 0.0
    largest: list[dict[str, object]] = field(default_factory=list)
    attention: list[str] = field(default_factory=list)


def marks_of(events: Iterable[Event]) -> list[Mark]:
    """Read a request's boundaries out of its trace, in nanoseconds of the trace's clock."""
    found = sorted(
        (event["ts"], event["name"].removeprefix(MARK))
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith(MARK)
    )
    return [
        Mark(round(at * 1e3), label, edge == "open")
        for at, (edge, label) in ((at, text.split(" ", 1)) for at, text in found)
    ]


def components_of(marks: Sequence[Mark]) -> list[Span]:
    """Give every stretch of a request to one of ``records.COMPONENTS``."""
    return [
        span._replace(owner=DECODE) if span.owner == DECODE_FORWARD else span
        for span in spans(with_decode(marks))
    ]


def works_of(events: Sequence[Event], on_device: bool) -> list[Work]:
    """Read the work out of a trace: kernels and copies of a device, or operators of a CPU.

    A kernel whose launching call is not in the trace counts as launched when it started.
    """
    if not on_device:
        return _operators(event for event in events if event.get("cat") == "cpu_op")
    launched: dict[object, float] = {}
    for event in events:
        if event.get("cat") in LAUNCHERS and "correlation" in event.get("args", {}):
            number = event["args"]["correlation"]
            launched[number] = min(event["ts"], launched.get(number, event["ts"]))
    found = []
    for event in events:
        if event.get("cat") in ON_DEVICE:
            start, length = float(event["ts"]), float(event["dur"])
            asked = launched.get(event["args"].get("correlation"), start)
            found.append(Work(event["name"], start, start + length, asked, length))
    return found


def _operators(events: Iterable[Event]) -> list[Work]:
    """Nest operators by their times, per thread."""
    by_thread: dict[object, list[Event]] = defaultdict(list)
    for event in events:
        by_thread[event["tid"]].append(event)
    found: list[Work] = []
    for own in by_thread.values():
        within: list[tuple[Event, list[float]]] = []  # open operators and what lies in them
        done: list[tuple[Event, list[float], bool]] = []
        for event in sorted(own, key=lambda e: (e["ts"], -e["dur"])):
            while within and event["ts"] >= within[-1][0]["ts"] + within[-1][0]["dur"]:
                within.pop()
            inner: list[float] = []
            done.append((event, inner, not within))
            if within:
                within[-1][1].append(event["dur"])
            within.append((event, inner))
        found += [
            Work(e["name"], e["ts"], e["ts"] + e["dur"], e["ts"], e["dur"] - sum(inner), outermost)
            for e, inner, outermost in done
        ]
    return found


def union_us(works: Iterable[Work]) -> float:
    """Add up the time during which at least one of them ran, in microseconds.

    >>> ran = [(0.0, 4.0), (2.0, 5.0), (7.0, 8.0)]
    >>> union_us(Work("k", start, end, 0.0, end - start) for start, end in ran)
    6.0
    """
    total, until = 0.0, float("-inf")
    for work in sorted(works, key=lambda work: work.start_us):
        total += max(0.0, work.end_us - max(work.start_us, until))
        until = max(until, work.end_us)
    return total


def attribute(
    events: Sequence[Event], on_device: bool
) -> tuple[dict[str, Share], dict[str, float]]:
    """Give a trace's work to the components of the request that it shows.

    Parameters
    ----------
    events
        The ``traceEvents`` of one profiled request, boundaries among them (see `marks_of`).
    on_device
        Whether kernels of a device are the work, or the CPU's operators.

    Returns
    -------
    shares
        By component; ``records.COMPONENTS`` in their order, and no other.
    total
        ``busy_ms`` and ``work_ms`` of the whole trace, and ``attributed``: which share of
        ``work_ms`` was launched between the first and the last boundary.
    """
    stretches = components_of(marks_of(events))
    starts = [span.start_ns / 1e3 for span in stretches]
    end_us = stretches[-1].end_ns / 1e3

    def owner(at_us: float) -> str | None:
        if not starts[0] <= at_us <= end_us:
            return None
        return stretches[bisect.bisect_right(starts, at_us) - 1].owner

    works = works_of(events, on_device)
    owned: dict[str | None, list[Work]] = defaultdict(list)
    for work in works:
        owned[owner(work.launched_us)].append(work)
    shares = {name: _share(owned[name]) for name in COMPONENTS}
    for span in stretches:
        shares[span.owner].host_ms += (span.end_ns - span.start_ns) / 1e6
    for event in events:
        if event.get("cat") in LAUNCHERS and WAITS.search(event["name"]):
            waiting = owner(event["ts"])
            if waiting is not None:
                shares[waiting].waiting_ms += event["dur"] / 1e3
    work_ms = sum(work.own_us for work in works) / 1e3
    stray_ms = sum(work.own_us for work in owned[None]) / 1e3
    total = {
        "busy_ms": union_us(works) / 1e3,
        "work_ms": work_ms,
        "attributed": 1 - stray_ms / work_ms if work_ms else 1.0,
    }
    return shares, total


def _share(works: list[Work]) -> Share:
    by_name: dict[str, list[float]] = defaultdict(list)
    for work in works:
        by_name[work.name].append(work.own_us / 1e3)
    total = sum(map(sum, by_name.values()))
    ordered = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    return Share(
        busy_ms=union_us(work for work in works if work.outermost) / 1e3,
        work_ms=total,
        kernels=sum(work.outermost for work in works),
        largest=[
            {"name": name, "ms": sum(each), "share": sum(each) / total, "count": len(each)}
            for name, each in ordered[:LARGEST]
            if total
        ],
        attention=attention_backends([name for name, _ in ordered]),
    )


def attention_backends(names: Sequence[str]) -> list[str]:
    """Tell by the names of kernels or operators which backends computed attention.

    A softmax says ``math`` only where no fused kernel ran: experts are routed by one too.

    >>> attention_backends(["gemm", "fmha_cutlassF_f32_aligned_64x64_rf_sm80(...)"])
    ['efficient']
    >>> attention_backends(["cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3"])
    ['cudnn']
    >>> attention_backends(["aten::mm", "aten::_softmax"])
    ['math']
    """
    found: dict[str, None] = {}
    for name in names:
        backend = next((b for b, pattern in ATTENTION.items() if pattern.search(name)), None)
        if backend:
            found[backend] = None
    fused = [backend for backend in found if backend in FUSED]
    return fused or list(found)


def ranges(events: Sequence[Event], on_device: bool, title: str = "") -> list[dict[str, object]]:
    """Make tracks of the components for a trace viewer: on the host and, beside it, on the device.

    The device's range of a stretch is from its first kernel's start to its last one's end.

    Returns
    -------
    list of dict
        Events to add to the trace.
    """
    stretches = components_of(marks_of(events))
    process = f"components {title}".strip()
    tracks = {1: "host", 2: "device"} if on_device else {1: "host"}
    at = {"pid": process, "ts": stretches[0].start_ns / 1e3}
    found: list[dict[str, object]] = [
        {**at, "ph": "M", "name": "process_name", "tid": 0, "args": {"name": process}},
        {**at, "ph": "M", "name": "process_sort_index", "tid": 0, "args": {"sort_index": -1}},
    ]
    found += [
        {**at, "ph": "M", "name": "thread_name", "tid": track, "args": {"name": name}}
        for track, name in tracks.items()
    ]

    def put(track: int, name: str, start_us: float, end_us: float) -> None:
        place = {"pid": process, "tid": track, "ts": start_us, "dur": end_us - start_us}
        found.append({**place, "ph": "X", "cat": "component", "name": name, "args": {}})

    for span in stretches:
        if span.end_ns > span.start_ns:
            put(1, span.owner, span.start_ns / 1e3, span.end_ns / 1e3)
    if on_device:
        starts = [span.start_ns / 1e3 for span in stretches]
        launched: dict[int, list[Work]] = defaultdict(list)
        for work in works_of(events, on_device):
            index = bisect.bisect_right(starts, work.launched_us) - 1
            if index >= 0:
                launched[index].append(work)
        for index, works in sorted(launched.items()):
            first, last = min(w.start_us for w in works), max(w.end_us for w in works)
            put(2, stretches[index].owner, first, last)
    return found


def bound(
    wall_ms: float, busy_ms: float, compute_ms: float | None, memory_ms: float | None
) -> str | None:
    """Name what a component is bound by.

    ``launches`` where the device is idle for a third of the time or more: faster kernels would
    then shorten it by less than launching them faster. Otherwise ``compute`` or ``memory``,
    whichever ceiling its work came closer to.

    Parameters
    ----------
    wall_ms, busy_ms
        How long it took without a profiler, and for how much of that the device computed.
    compute_ms, memory_ms
        Its FLOPs and bytes over the machine's measured ceilings; None where they are not known.

    Examples
    --------
    >>> bound(18.0, 9.0, 0.02, 4.7), bound(8.2, 7.0, 0.02, 4.7), bound(21.7, 20.0, 15.5, 5.0)
    ('launches', 'memory', 'compute')
    """
    if wall_ms <= 0:
        return None
    if 1 - busy_ms / wall_ms >= LAUNCH_BOUND:
        return "launches"
    if compute_ms is None or memory_ms is None or not compute_ms + memory_ms:
        return None
    return "compute" if compute_ms > memory_ms else "memory"


LAUNCH_BOUND = 1 / 3
