"""Which kernels a request runs, seen once under a profiler, beside how long it takes without one."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vlm_latency.errors import MeasurementError
from vlm_latency.instrument.attribution import MARK, Share, attribute, ranges
from vlm_latency.instrument.meter import Meter, Reading
from vlm_latency.instrument.session import Fetch, Session, SessionLog, undisturbed
from vlm_latency.option_groups import ExplainOptions
from vlm_latency.options import MeasurementOptions
from vlm_latency.records import Row, plain_rows

if TYPE_CHECKING:
    import torch

    from vlm_latency.models.interface import LoadedModel
    from vlm_latency.models.requests import Prepared

TRIES = 3  # that saw kernels
MAX_TRIES = 8

Trace = dict[str, Any]  # in Chrome's format

log = logging.getLogger("vlm_latency")


@dataclass(frozen=True)
class Profile:
    """One request under the profiler.

    Attributes
    ----------
    request_id
        Whose.
    shares
        What each component did.
    total
        Of the whole trace; see `attribution.attribute`.
    profiled_ms
        ``T_total`` on the host's clock meanwhile.
    slowdown
        That over the median of the runs without a profiler.
    """

    request_id: str
    shares: dict[str, Share]
    total: dict[str, float]
    profiled_ms: float
    slowdown: float


def explain(
    vlm: LoadedModel,
    requests: pd.DataFrame,
    options: ExplainOptions,
    fetch: Fetch,
    *,
    template: str = "{question}",
    measurement: MeasurementOptions | None = None,
) -> tuple[list[Row], list[Profile], Trace]:
    """Run each request without a profiler, many times, and then once under it.

    Parameters
    ----------
    requests
        One per shape; each writes ``options.output_tokens`` tokens.
    fetch
        Gives the encoded image of a request.
    measurement
        How to warm up; the method is ``timeline`` whatever it says.

    Returns
    -------
    rows
        Records of the runs without a profiler, ``run_index`` among them.
    profiles
        One per request.
    trace
        A Chrome trace of all profiled requests, with the components as ranges.

    Raises
    ------
    MeasurementError
        For a model without times of its own, and where a request cannot be run.
    """
    if vlm.architecture.simulated:
        raise MeasurementError(
            f"found model.name={vlm.options.name}; expected a model that takes time: there is "
            "nothing to explain"
        )
    asked = plain_rows(requests.assign(output_length=str(options.output_tokens)))
    fixed = {"method": "timeline", "warmup": "plateau"}
    settled = (measurement or MeasurementOptions()).model_copy(update=fixed)
    session = Session(vlm, settled, fetch, template, SessionLog())
    generator = np.random.default_rng(settled.seed)
    rows: list[Row] = []
    traces: list[Trace] = []
    profiles = []
    with undisturbed(vlm), contextlib.closing(session):
        session.open(asked, asked)
        for run_index in range(options.num_runs):
            for which in generator.permutation(len(asked)):
                row = session.run(asked[which])
                if row["error"]:
                    raise MeasurementError(
                        f"request {asked[which]['request_id']} could not be run: {row['error']}"
                    )
                rows.append({**row, "request_id": asked[which]["request_id"],
                             "run_index": run_index, "order_index": len(rows)})  # fmt: skip
        for request in asked:
            own = [r for r in rows if r["request_id"] == request["request_id"]]
            usual_ms = float(np.median([_host_ms(row) for row in own]))
            trace, reading = profiled(
                session.meter, session.prepare(request), options.output_tokens
            )
            profile, trace = _explained(request, trace, reading, usual_ms)
            log.info(
                "explain: %s under the profiler took %.1f ms, %.2f times as long as without",
                profile.request_id,
                profile.profiled_ms,
                profile.slowdown,
            )
            profiles.append(profile)
            traces.append(trace)
    whole = {**traces[0], "traceEvents": [e for trace in traces for e in trace["traceEvents"]]}
    return rows, profiles, whole


def _explained(
    request: Row, trace: Trace, reading: Reading, usual_ms: float
) -> tuple[Profile, Trace]:
    """Attribute one trace, and put the components' ranges into it."""
    events = trace["traceEvents"]
    on_device = reading.times["T_total_host"] is not None
    shares, total = attribute(events, on_device)
    if not total["work_ms"]:
        raise MeasurementError(
            f"the profiler saw no kernel on the device in {MAX_TRIES} tries, only "
            f"{', '.join(sorted(_categories(trace)))}; expected CUPTI to be usable (is another "
            "profiler attached, or are performance counters restricted to administrators?)"
        )
    taken_ms = _host_ms(reading.times)
    name = str(request["request_id"])
    profile = Profile(name, shares, total, taken_ms, taken_ms / usual_ms)
    return profile, {**trace, "traceEvents": [*events, *ranges(events, on_device, name)]}


def _host_ms(times: Row) -> float:
    """T_total on the host's clock, which is the only one without a device."""
    host = times.get("T_total_host")
    return float(times["T_total"] if host is None else host)


def profiled(meter: Meter, prepared: Prepared, tokens: int) -> tuple[Trace, Reading]:
    """Measure one request under ``torch.profiler``, its boundaries marked in the trace.

    It is tried until three tries saw the device's kernels, of which the least disturbed one, the
    quickest, is kept: a profiler that starts for the first time in a process takes its time inside
    the request. Kernels whose times, converted from the device's clock, lie outside of the
    profiler's window are dropped by it; so each try that saw none widens the window.

    Parameters
    ----------
    meter
        A timeline, warm for this request.

    Returns
    -------
    trace, reading
        The Chrome trace, and what the meter read meanwhile.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    def mark(label: str, opens: bool) -> None:
        with record_function(f"{MARK}{'open' if opens else 'close'} {label}"):
            pass

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it announces every start and stop
    activities = [ProfilerActivity.CPU]
    if meter.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    on_device = meter.device.type == "cuda"
    seen, margin_s = [], 0.0
    usual, meter.timeline.listener = meter.timeline.listener, mark
    try:
        for _ in range(MAX_TRIES):
            with profile(activities=activities, acc_events=True) as profiler:
                time.sleep(margin_s)
                reading = meter(prepared, tokens)
                time.sleep(margin_s)
            trace = _chrome_trace(profiler)
            if not on_device or "kernel" in _categories(trace):
                seen.append((_host_ms(reading.times), trace, reading))
                if len(seen) == TRIES:
                    break
            else:
                margin_s = 3 * margin_s or 0.03
    finally:
        meter.timeline.listener = usual
    if not seen:
        return trace, reading  # without a kernel, as the caller will say
    return min(seen, key=lambda attempt: attempt[0])[1:]


def _categories(trace: Trace) -> set[str]:
    return {event["cat"] for event in trace["traceEvents"] if "cat" in event}


def _chrome_trace(profiler: torch.profiler.profile) -> Trace:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return dict(json.loads(path.read_text(encoding="utf-8")))
