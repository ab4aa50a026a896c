"""exp2: time and parameters of each component."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_latency.options import ExperimentOptions
from vlm_latency.pipelines.reporting import common
from vlm_latency.pipelines.reporting.exp1 import outliers, question_entries

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vlm_latency.models import ModelHandle


def report(
    options: ExperimentOptions,
    records: pd.DataFrame,
    requests: pd.DataFrame,
    coverage: dict[str, Any],
    environment: dict[str, Any],
    model: ModelHandle,
) -> tuple[dict[str, Any], dict[str, pd.DataFrame], Figure, Figure]:
    """Report on the components.

    Returns
    -------
    result, tables, parameters, latency
        ``exp2_component_profiling`` as JSON, tables for people, and the two figures.
    """
    from vlm_latency import statistics as st
    from vlm_latency.plots.composition import latency_components, parameters_pie
    from vlm_latency.plots.style import Style

    rows = common.succeeded(records)
    means, shares = common.means(rows), common.shares(rows)
    parameters = model.architecture.parameters.to_dict()
    if options.protocol == "seed" and parameters.get("params_image_projector") is not None:
        parameters["params_projector"] = parameters["params_image_projector"]
    llm = None
    if {"T_LLM_prefill", "T_LLM_decode"} <= shares.keys():
        llm = st.ratio_estimate(
            rows["T_LLM_prefill"] + rows["T_LLM_decode"], rows["T_total"], common.clusters(rows)
        )
    entries = question_entries(records, requests)
    found = {
        "means": means,
        "shares": shares,
        "llm_share": llm,
        "n": len(entries),
        "outliers": outliers(rows),
    }
    context, style = common.context(options, environment, coverage), Style.of(options.figures)
    claims = [
        st.llm_bottleneck_claim(_share(parameters), llm),
    ]
    averaged = common.entries(records, requests).drop(columns=["image_id", "question_id"])
    numbers = averaged.select_dtypes("number").mean()
    result = {
        "results": entries,
        "average_latencies": {str(name): value for name, value in numbers.items()},
        "parameters": parameters,
        **common.frame(options, environment, coverage, found, claims),
    }
    tables = {
        "latency": common.estimates_table(means, "ms"),
        "shares": common.estimates_table(shares, "share of T_total"),
        "parameters": pd.DataFrame({"component": parameters.keys(), "count": parameters.values()}),
    }
    return (
        result,
        tables,
        parameters_pie(parameters, context, style),
        latency_components(rows, found, context, style),
    )


def _share(parameters: dict[str, int | None]) -> float | None:
    """The LLM's share of the parameters."""
    total = parameters["params_total"]
    return (parameters["params_llm"] or 0) / total if total else None
