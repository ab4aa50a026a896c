"""Nodes of explain: choose requests, profile them, report what bounds each component."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_latency.errors import DataError
from vlm_latency.options import ExperimentOptions, Options
from vlm_latency.records import COMPONENTS, COST_TIMES, measured_table, with_hashes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vlm_latency.instrument.explain import Profile
    from vlm_latency.models import ModelHandle
    from vlm_latency.vqa import QuestionSource

log = logging.getLogger("vlm_latency")

ATTRIBUTED = 0.99  # of the kernels' time, at least
LIKE = "exp2"  # whose shapes are looked at, where no sizes are asked for


def choose_requests(
    settings: Options,
    model: ModelHandle,
    questions: QuestionSource,
    given: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Take one request for each shape that exp2 measures, the most frequent ones first.

    Parameters
    ----------
    given
        Requests of exp2 that were made before, if so.

    Returns
    -------
    DataFrame
        Columns ``records.REQUEST_COLUMNS``; of the sizes asked for, one request each.

    Raises
    ------
    DataError
        As exp2's drawing does, and when no image of its requests can be read.
    """
    from vlm_latency import vqa
    from vlm_latency.pipelines.data_sampling.nodes import draw_requests

    asked = settings.explain
    if asked.sizes:
        requests = vqa.sweep_sizes_requests(asked.sizes)
    else:
        drawn = draw_requests(settings.experiment(LIKE, model.weights), questions, model, given)
        drawn = drawn.dropna(subset=["image_width"])  # its image is missing or broken
        if drawn.empty:
            raise DataError(f"no image of {LIKE}'s requests can be read; set explain.sizes")
        sizes = zip(
            drawn["image_width"].astype(int), drawn["image_height"].astype(int), strict=True
        )
        counts = [model.architecture.image_tokens(*size) for size in sizes]
        drawn["shape"] = [f"{found.num_crops} {found.num_vision_patches}" for found in counts]
        drawn["often"] = drawn.groupby("shape")["shape"].transform("size")
        first = drawn.drop_duplicates("shape").sort_values("often", ascending=False, kind="stable")
        requests = first.drop(columns=["shape", "often"]).head(asked.max_shapes)
        if len(first) > len(requests):
            log.info(
                "explain: the %d most frequent of %d shapes (explain.max_shapes)",
                *(len(requests), len(first)),
            )
    ids = requests["request_id"].str.replace(r"^exp\d", "explain", regex=True)
    return with_hashes(
        requests.assign(
            request_id=ids, experiment="explain", output_length=str(asked.output_tokens)
        ).reset_index(drop=True)
    )


def profile(
    options: ExperimentOptions[Any],
    settings: Options,
    requests: pd.DataFrame,
    model: ModelHandle,
    questions: QuestionSource,
    ceilings: dict[str, Any],
) -> tuple[pd.DataFrame, list[Profile], dict[str, Any]]:
    """Run every request without a profiler, then once under it.

    Parameters
    ----------
    ceilings
        What this machine can do; that it was measured before is all that matters here.

    Returns
    -------
    records
        The runs without a profiler, columns ``records.MEASURED_COLUMNS``.
    profiles
        What each component of each request did.
    trace
        A Chrome trace.
    """
    from vlm_latency.instrument.explain import explain
    from vlm_latency.vqa import image_bytes

    rows, profiles, trace = explain(
        model.vlm,
        requests,
        settings.explain,
        lambda row: image_bytes(row, questions.root),
        template=options.prompt.template,
        measurement=options.measurement,
    )
    return measured_table(rows), profiles, trace


def report(
    options: ExperimentOptions[Any],
    settings: Options,
    requests: pd.DataFrame,
    model: ModelHandle,
    questions: QuestionSource,
    ceilings: dict[str, Any],
    records: pd.DataFrame,
    profiles: list[Profile],
) -> tuple[dict[str, Any], dict[str, pd.DataFrame], Figure]:
    """Say what bounds each component of each request.

    Returns
    -------
    result
        ``explain.json``: ``components`` of the first request (the most frequent shape), by name
        with ``wall, busy, idle, bound`` and what they rest on (see `components`); ``results`` has
        those of every request.
    tables
        ``components`` and ``kernels``.
    figure
        Busy and idle time, and how close each component came to the ceilings.
    """
    from vlm_latency.costs import add_costs
    from vlm_latency.pipelines.measurement.nodes import describe_environment
    from vlm_latency.pipelines.reporting.results import context, frame
    from vlm_latency.plots.explanation import explanation
    from vlm_latency.plots.style import Style

    costs = add_costs(
        records.drop_duplicates("request_id"),
        model.architecture,
        counted=False,
        hardware=ceilings or None,
        dtype=model.dtype,
    ).set_index("request_id")
    results = []
    for request_id in requests["request_id"]:
        own = records[records["request_id"] == request_id]
        seen = next(profile for profile in profiles if profile.request_id == request_id)
        cost = costs.loc[request_id]
        results.append(
            {
                "request_id": request_id,
                **{name: int(cost[name]) for name in SHOWN},
                "num_runs": len(own),
                "profiled_ms": seen.profiled_ms,
                "slowdown": seen.slowdown,
                **seen.total,
                "components": components(own, seen, cost, ceilings),
            }
        )
    about = describe_environment(options, model, questions)
    on_device = model.device.startswith("cuda")
    statistics = {
        **summary(results[0]),
        "work": "kernels" if on_device else "operators",
        "notes": notes(results),
    }
    coverage = {"requests": len(requests), "runs": len(records)}
    result = {
        **frame(options, about, coverage, statistics, []),
        "components": results[0]["components"],
        "results": results,
    }
    result["options"]["explain"] = settings.explain.model_dump(mode="json")
    figure = explanation(
        results, statistics, context(options, about, {}), Style.of(options.figures)
    )
    return result, tables(results), figure


SHOWN = (
    *("image_width", "image_height", "num_crops", "num_vision_patches", "num_vision_tokens"),
    *("num_total_tokens", "num_output_tokens"),
)


def components(
    runs: pd.DataFrame, seen: Profile, cost: pd.Series, ceilings: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Put together what is known of each component of one request.

    Parameters
    ----------
    runs
        Its records without a profiler.
    seen
        What the profiler showed.
    cost
        Its ``flops_*``, ``bytes_*`` and ``roofline_*``.

    Returns
    -------
    dict
        By component: ``wall`` (median of the runs without a profiler, milliseconds), ``host_ms``
        (the same on the host's clock), ``busy`` (the device computes, milliseconds), ``idle``
        (what of ``wall`` that leaves; below zero where the profiled run was slower), ``idle_share``,
        ``kernels``, ``largest``, ``attention``, ``flops`` and ``bytes``, achieved per second of
        ``wall`` and as a share of the machine's ceilings, ``bound`` (see `attribution.bound`) and
        beside it what the roofline says without any measurement of the model.
    """
    from vlm_latency.instrument.attribution import bound
    from vlm_latency.statistics import percentile

    part_of = {column: part for part, column in COST_TIMES.items()}
    peaks = {"flops": ceilings.get("flops_per_s"), "bytes": ceilings.get("bytes_per_s")}
    found: dict[str, dict[str, Any]] = {}
    for name in COMPONENTS:
        share, wall = seen.shares[name], percentile(runs[name], 50)
        wall_ms = float(wall.value or 0)
        host = runs[f"{name}_host"].dropna()
        about: dict[str, Any] = {
            "wall": wall,
            "host_ms": float(host.median()) if len(host) else wall_ms,
            "busy": share.busy_ms,
            "idle": wall_ms - share.busy_ms,
            "idle_share": 1 - share.busy_ms / wall_ms if wall_ms else None,
            "kernels": share.kernels,
            "waiting_ms": share.waiting_ms,
            "largest": share.largest,
            "attention": share.attention,
        }
        ideal: dict[str, float | None] = {"flops": None, "bytes": None}
        part = part_of.get(name)
        if part:
            amounts = {"flops": cost[f"flops_{part}_analytic"], "bytes": cost[f"bytes_{part}"]}
            for kind, amount in amounts.items():
                rate = float(amount) / wall_ms * 1e3 if wall_ms else None
                peak = peaks[kind]
                about |= {kind: float(amount), f"{kind}_per_s": rate}
                if peak:
                    ideal[kind] = float(amount) / peak * 1e3
                    about[f"{kind}_share_of_ceiling"] = rate / peak if rate else None
            about["roofline_bound"] = cost.get(f"roofline_bound_{part}")
            about["roofline_ms"] = cost.get(f"roofline_ms_{part}")
        about["bound"] = bound(wall_ms, share.busy_ms, ideal["flops"], ideal["bytes"])
        found[name] = about
    return found


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Say of one request which bound takes most of its time, and for how much of it."""
    from vlm_latency.plots.notation import number

    parts = result["components"]
    wall_ms = {name: float(about["wall"].value or 0) for name, about in parts.items()}
    total_ms = sum(wall_ms.values())
    busy_share = sum(about["busy"] for about in parts.values()) / total_ms
    by_bound: dict[str, float] = {}
    for name, about in parts.items():
        if about["bound"]:
            by_bound[about["bound"]] = by_bound.get(about["bound"], 0.0) + wall_ms[name]
    most = max(by_bound, key=lambda word: by_bound[word])
    computes = f"the device computes during {number(100 * busy_share)} %"
    if busy_share > 1:
        computes = "the profiled run leaves no idle time"
    return {
        "finding": (
            f"{number(100 * by_bound[most] / total_ms)} % of {number(total_ms)} ms is bound by "
            f"{most}; {computes}"
        ),
        "bound": {name: about["bound"] for name, about in parts.items()},
        "busy_share": busy_share,
        "attention": sorted({a for about in parts.values() for a in about["attention"]}),
        "attributed": result["attributed"],
        "slowdown": result["slowdown"],
    }


def notes(results: list[dict[str, Any]]) -> list[str]:
    """Name what a reader has to know."""
    found = [
        f"{result['request_id']}: under the profiler it took {result['slowdown']:.2f} times as long; "
        "nothing else is timed in that run"
        for result in results
    ]
    found += [
        f"{result['request_id']}: only {result['attributed']:.1%} of the time of its kernels could be "
        "attributed to a component"
        for result in results
        if result["attributed"] < ATTRIBUTED
    ]
    slower = [
        f"{result['request_id']} {name}"
        for result in results
        for name, about in result["components"].items()
        if about["idle"] < 0
    ]
    if slower:
        found.append(
            f"busy for longer than the runs without a profiler took, so idle is negative: "
            f"{', '.join(slower)}"
        )
    return found


def tables(results: list[dict[str, Any]]) -> dict[str, pd.DataFrame]:
    """Put components, and their largest kernels, side by side."""
    rows, kernels = [], []
    for result in results:
        for name, about in result["components"].items():
            own = {"request": result["request_id"], "component": name}
            rows.append(
                {
                    **own,
                    "wall ms": about["wall"].value,
                    "busy ms": about["busy"],
                    "idle ms": about["idle"],
                    "idle share": about["idle_share"],
                    "kernels": about["kernels"],
                    "host ms": about["host_ms"],
                    "attention": ", ".join(about["attention"]),
                    "TFLOP/s": _scaled(about.get("flops_per_s"), 1e12),
                    "of ceiling": about.get("flops_share_of_ceiling"),
                    "GB/s": _scaled(about.get("bytes_per_s"), 1e9),
                    "of ceiling ": about.get("bytes_share_of_ceiling"),
                    "bound": about["bound"],
                    "roofline says": about.get("roofline_bound"),
                }
            )
            kernels += [{**own, **kernel} for kernel in about["largest"]]
    return {"components": pd.DataFrame(rows), "kernels": pd.DataFrame(kernels)}


def _scaled(value: float | None, by: float) -> float | None:
    return None if value is None else value / by
