"""exp2: time and parameters of each component."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_latency.options import ExperimentOptions
from vlm_latency.pipelines.reporting import entries, results
from vlm_latency.plots.notation import LABELS, interval, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vlm_latency.models import ModelHandle
    from vlm_latency.statistics import Claim

VERDICTS = {
    "supported": "the LLM is the bottleneck",
    "contradicted": "the LLM is not the bottleneck",
    "undecided": "whether the LLM is the bottleneck is undecided",
}


def report(
    options: ExperimentOptions,
    records: pd.DataFrame,
    requests: pd.DataFrame,
    coverage: dict[str, Any],
    environment: dict[str, Any],
    model: ModelHandle,
) -> tuple[dict[str, Any], dict[str, pd.DataFrame], Figure, Figure, Figure]:
    """Report on the components.

    Returns
    -------
    result, tables, parameters, latency, components
        ``exp2_component_profiling`` as JSON, tables for people, and the figures: two pies, as the
        seed study has them, and what pies cannot show.
    """
    from vlm_latency import statistics as st
    from vlm_latency.plots.composition import latency_components, latency_pie, parameters_pie
    from vlm_latency.plots.style import Style

    coverage = results.with_cost_notes(coverage, records)
    rows = entries.succeeded(records)
    means, shares = results.means(rows), results.shares(rows)
    parameters = model.architecture.parameters.to_dict()
    if options.protocol == "seed" and parameters.get("params_image_projector") is not None:
        parameters["params_projector"] = parameters["params_image_projector"]
    llm = None
    if {"T_LLM_prefill", "T_LLM_decode"} <= shares.keys():
        llm = st.ratio_estimate(
            rows["T_LLM_prefill"] + rows["T_LLM_decode"], rows["T_total"], entries.clusters(rows)
        )
    found: dict[str, Any] = {
        "means": means,
        "shares": shares,
        "llm_share": llm,
        "n": rows["request_id"].nunique(),
        "disturbed": results.disturbance(
            rows,
            "the mean of T_total",
            lambda runs: results.means(runs, ["T_total"]).get("T_total"),
        ),
        "reached": results.reached(rows),
        "outliers": results.outliers(rows),
        "notes": results.not_computed(rows),
    }
    claim = st.llm_bottleneck_claim(_share(parameters), llm)
    finding = _finding(found, claim)
    context = results.context(options, environment, coverage, _title(found))
    if (disturbed := found["disturbed"]) and disturbed.moved:
        context = replace(context, marks=(*context.marks, str(disturbed)))
    judged = replace(context, finding=f"{context.finding}; {VERDICTS[claim.verdict]}")
    style = Style.of(options.figures)
    averaged = entries.averaged(records, requests).drop(columns=["image_id", "question_id"])
    numbers = averaged.select_dtypes("number").mean()
    result = {
        **entries.question_entries(records, requests),
        "average_latencies": {str(name): value for name, value in numbers.items()},
        "parameters": parameters,
        **results.frame(options, environment, coverage, found, [claim], finding),
    }
    tables = {
        "paper": results.paper_table("exp2", found),
        "latency": results.estimates_table(means, "ms"),
        "shares": results.estimates_table(shares, "share of T_total"),
        "reached": results.reached_table(found["reached"]),
        "parameters": pd.DataFrame({"component": parameters.keys(), "count": parameters.values()}),
    }
    return (
        result,
        tables,
        parameters_pie(parameters, context, style),
        latency_pie(found, context, style),
        latency_components(rows, found, judged, style),
    )


def _most(found: dict[str, Any]) -> str | None:
    """Name the component that has the largest share of the time."""
    known = {name: share for name, share in found["shares"].items() if share.value is not None}
    return max(known, key=lambda name: known[name].value, default=None)


def _title(found: dict[str, Any]) -> str:
    """Say in one line or two, the width of a pie, where most of the time goes."""
    total = f"{number(found['means']['T_total'].value)} ms"
    if (most := _most(found)) is None:
        return f"{total} per request"
    return f"{interval(found['shares'][most], '%', 100)} of {total} in {_place(most)}"


def _place(component: str) -> str:
    return "no component" if component == "T_other" else f"the {LABELS[component]}"


def _finding(found: dict[str, Any], claim: Claim) -> str:
    """Say what the claim's verdict allows."""
    from vlm_latency.statistics.claims import BOTTLENECK_SHARE

    means, shares, disturbed = found["means"], found["shares"], found["disturbed"]
    said = f"{interval(means['T_total'], 'ms')} per request"
    llm, most = found["llm_share"], _most(found)
    if claim.verdict == "supported":
        said += f", {interval(llm, '%', 100)} of it in the LLM: the bottleneck"
    elif most:
        said += f", {interval(shares[most], '%', 100)} of it in {_place(most)}"
        if claim.verdict == "contradicted":
            lacking = "latency" if llm is not None and llm.below(BOTTLENECK_SHARE) else "parameters"
            said += f"; the LLM holds less than half of the {lacking}: not the bottleneck"
        else:
            said += "; whether the LLM is the bottleneck is undecided"
    return results.sentence(said, str(disturbed) if disturbed and disturbed.moved else None)


def _share(parameters: dict[str, int | None]) -> float | None:
    """The LLM's share of the parameters."""
    total = parameters["params_total"]
    return (parameters["params_llm"] or 0) / total if total else None
