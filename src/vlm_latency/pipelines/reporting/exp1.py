"""exp1: how latency is distributed over requests, and what makes its tail."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_latency.options import ExperimentOptions
from vlm_latency.pipelines.reporting import entries, results
from vlm_latency.plots.notation import interval, number
from vlm_latency.records import chosen

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vlm_latency.statistics import Claim, Summary


def report(
    options: ExperimentOptions,
    records: pd.DataFrame,
    requests: pd.DataFrame,
    coverage: dict[str, Any],
    environment: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, pd.DataFrame], Figure]:
    """Report on the distribution of latency.

    Returns
    -------
    result, tables, figure
        ``exp1_latency_distribution`` as JSON, tables for people, and the figure.
    """
    from vlm_latency import statistics as st
    from vlm_latency.plots.distribution import latency_distribution
    from vlm_latency.plots.style import Style
    from vlm_latency.statistics.variance import FACTORS

    coverage = results.with_cost_notes(coverage, records)
    rows = entries.succeeded(records)
    # Runs beyond num_runs repeat some requests to know the noise; they would count these twice.
    own = rows["run_index"] < options.measurement.num_runs
    sample = chosen(rows, own).reset_index(drop=True)
    notes = results.not_computed(rows)
    summaries = {
        name: st.summary(known[name], entries.clusters(known))
        for name in ("T_total", "T_first_token", "T_preprocess")
        if not (known := sample[sample[name].notna()]).empty
    }
    factors = dict(FACTORS)
    new = rows["first_of_length"].fillna(False).astype(bool)
    costs = (coverage.get("lengths") or {}).get("costs")
    if new.any() and not new.all() and costs is not False:
        factors["first visit of a length"] = "first_of_length"
    told = rows.assign(image_id=entries.clusters(rows), first_of_length=new)
    if len(rows["worker_index"].dropna().unique()) > 1:
        # a request that several measured counts as the first's
        told["worker_index"] = rows.groupby("request_id")["worker_index"].transform("first")
        factors["worker"] = "worker_index"
    budget = results.unless_impossible(
        notes,
        "variance budget",
        st.variance_budget,
        told,
        factors=factors,
        categorical=("num_crops", "worker_index"),
    )
    total = summaries["T_total"]
    found: dict[str, Any] = {
        **summaries,
        "variance_budget": budget,
        "disturbed": results.disturbance(
            sample,
            "P95 of T_total",
            lambda runs: st.percentile(runs["T_total"], 95, clusters=entries.clusters(runs)),
        ),
        "new_lengths": coverage.get("lengths"),
        "outliers": results.outliers(rows),
        "accuracy": results.accuracy(rows, requests, environment),
        "notes": notes,
    }
    claim = st.tail_claim(total.tail_ratio)
    finding = _finding(total, claim, found["disturbed"])
    figure = latency_distribution(
        sample,
        found,
        results.context(options, environment, coverage, finding),
        Style.of(options.figures),
    )
    result = {
        **entries.question_entries(rows, requests),
        **results.frame(options, environment, coverage, found, [claim], finding),
    }
    tables = {
        "paper": results.paper_table("exp1", found),
        "percentiles": percentiles_table(summaries),
        "by_tiling": _by(sample, "num_crops"),
        "by_output_length": _by(sample, "num_output_tokens"),
    }
    return result, tables, figure


def _finding(total: Summary, claim: Claim, disturbed: results.Disturbance | None) -> str:
    """Say what the claim's verdict allows; a percentile without an upper bound is no headline."""
    half = f"half of the requests take {interval(total.P50, 'ms')} or less"
    ratio = total.tail_ratio
    if claim.verdict == "undecided" or ratio is None:
        most = f", 95 % take {interval(total.P95, 'ms')} or less" if total.P95.high else ""
        tail = f"{most}; whether P99 ≫ P50 cannot be said from n = {total.n:,}"
    elif ratio.high is None:
        tail = f", and the tail is long: P99 is at least {number(ratio.low)} times that"
    elif claim.verdict == "supported":
        tail = f", and the tail is long: P99 is {interval(ratio)} times that"
    else:
        tail = f", and the tail is short: P99 is {interval(ratio)} times that"
    return results.sentence(half + tail, str(disturbed) if disturbed and disturbed.moved else None)


def percentiles_table(summaries: dict[str, Summary]) -> pd.DataFrame:
    """Put distributions side by side."""
    lines = []
    for name, summary in summaries.items():
        line: dict[str, Any] = {"quantity": name, "n": summary.n}
        for key in ("mean", "P50", "P95", "P99"):
            estimate = getattr(summary, key)
            line |= {key: estimate.value, f"{key} low": estimate.low, f"{key} high": estimate.high}
        lines.append(line | {"std": summary.std, "min": summary.min, "max": summary.max})
    return pd.DataFrame(lines)


def _by(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    groups = rows.groupby(column)["T_total"]
    return groups.agg(n="size", median_ms="median", mean_ms="mean", max_ms="max").reset_index()
