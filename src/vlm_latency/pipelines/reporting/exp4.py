"""exp4: what an output token costs, and whether a step gets slower as the cache grows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vlm_latency.experiments import LanguageSampling
from vlm_latency.options import ExperimentOptions
from vlm_latency.pipelines.reporting import entries, results
from vlm_latency.plots.notation import interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vlm_latency.statistics import Claim, Estimate

BINS = 48  # of positions, for the line through the steps
FITTED = ("T_LLM_decode", "T_total")
SPLIT = ("T_LLM_decode_forward", "T_LLM_decode_between")


def report(
    options: ExperimentOptions,
    records: pd.DataFrame,
    requests: pd.DataFrame,
    coverage: dict[str, Any],
    environment: dict[str, Any],
    ceilings: dict[str, Any],
    given_requests: pd.DataFrame | None,
) -> tuple[dict[str, Any], dict[str, pd.DataFrame], Figure]:
    """Report on output tokens.

    Returns
    -------
    result, tables, figure
        ``exp4_language_tokens_vs_latency`` as JSON, tables for people, and the figure.
    """
    from vlm_latency import statistics as st
    from vlm_latency.plots.language_sweep import language_tokens_vs_latency
    from vlm_latency.plots.style import Style

    coverage = results.with_cost_notes(coverage, records)
    rows = entries.succeeded(records)
    notes = results.not_computed(rows)
    image, tokens = entries.clusters(rows), rows["num_output_tokens"].astype(float)
    lines = results.fits(rows, "num_output_tokens", FITTED, image, notes)
    claim, growth, exponent = linear(rows, notes)
    steps = _steps(rows)
    # The first step after a prefill is another one: it meets the device in another state.
    first, later = steps[steps["position"] == 1], steps[steps["position"] > 1]
    prefill = results.means(rows, ["T_first_token"]).get("T_first_token")
    found: dict[str, Any] = {
        "fits": results.banded(lines, tokens),
        "lines": lines,
        "exponent": exponent,
        "lengths": _lengths(rows),
        "prefill": prefill,
        "steps": _smooth(later),
        "first_step": st.mean_estimate(first["ms"], first["image"]) if len(first) else None,
        "later_steps": st.mean_estimate(later["ms"], later["image"]) if len(later) else None,
        "decode_split": results.means(rows, SPLIT),
        "step_growth": growth,
        "dropped_lengths": _dropped(options, requests, given_requests),
        "disturbed": results.disturbance(rows, "an output token's time", _slope),
        "reached": results.reached(rows),
        "outliers": results.outliers(rows),
        "notes": notes,
    }
    finding = _finding(found, claim)
    figure = language_tokens_vs_latency(
        rows,
        found,
        results.context(options, environment, coverage, finding),
        Style.of(options.figures),
    )
    table = entries.averaged(records, requests, entries.COSTS)
    result = {
        "results": entries.entry_dicts(table, {"query_id": "question_id"}),
        "use_eos_token": options.sampling.use_eos_token,
        "ceilings": ceilings,
        **results.frame(options, environment, coverage, found, [claim], finding),
    }
    lengths = pd.DataFrame(
        [
            {"num_output_tokens": line["num_output_tokens"]}
            | {name: line[name].value for name in (*results.MEANS, *SPLIT) if name in line}
            for line in found["lengths"]
        ]
    )
    tables = {
        "paper": results.paper_table("exp4", found),
        "lengths": lengths,
        "slopes": results.slopes_table(lines),
        "reached": results.reached_table(found["reached"]),
    }
    return result, tables, figure


def linear(rows: pd.DataFrame, notes: list[str]) -> tuple[Claim, Estimate | None, Estimate | None]:
    """Judge whether output tokens scale linearly.

    Returns
    -------
    claim, growth, exponent
        The last decode step over the second, and the exponent of T_LLM_decode; both clustered by
        image.
    """
    from vlm_latency import statistics as st

    decoded = rows[(rows["num_output_tokens"] > 1) & (rows["T_LLM_decode"] > 0)]
    law = results.unless_impossible(
        notes,
        "exponent",
        st.power_law_fit,
        decoded["num_output_tokens"].astype(float) - 1,
        decoded["T_LLM_decode"],
        entries.clusters(decoded),
    )
    exponent, growth, steps = law.exponent if law else None, None, _steps(rows)
    later = steps[steps["position"] > 1]
    if later["position"].nunique() > 2:
        line = st.linear_fit(later["position"], later["ms"], later["image"])
        growth = line.growth(2, float(later["position"].max()))
    return st.language_linear_claim(growth, exponent), growth, exponent


def _slope(rows: pd.DataFrame) -> Estimate | None:
    image = entries.clusters(rows)
    fits = results.fits(rows, "num_output_tokens", ["T_LLM_decode"], image, [])
    return fits["T_LLM_decode"].headline.slope if fits else None


def _finding(found: dict[str, Any], claim: Claim) -> str:
    """Say what the claim's verdict allows; what is undecided is no headline."""
    said = []
    if "T_LLM_decode" in found["lines"]:
        line = found["lines"]["T_LLM_decode"]
        slope = line.headline.slope
        said.append(f"each output token takes {interval(slope, 'ms')}{results.typical(line)}")
        if not slope.above(0):
            said = [f"what an output token takes cannot be told from zero: {interval(slope, 'ms')}"]
    growth = found["step_growth"]
    if claim.verdict == "undecided":
        said.append("whether steps get slower cannot be said from these runs")
    elif growth is not None:
        flat = ", no more than 10 % off: linear" if claim.verdict == "supported" else ""
        said.append(f"the last step takes {interval(growth)} × the second{flat}")
    if dropped := found["dropped_lengths"]:
        said.append(f"{', '.join(map(str, dropped))} tokens do not fit the model: left out")
    disturbed = found["disturbed"]
    return results.sentence(*said, str(disturbed) if disturbed and disturbed.moved else None)


def _dropped(
    options: ExperimentOptions[LanguageSampling],
    requests: pd.DataFrame,
    given: pd.DataFrame | None,
) -> list[int]:
    """List the output lengths that were asked for and not measured: they do not fit the model."""
    asked = (
        set(map(str, options.sampling.max_new_tokens_list))
        if given is None
        else set(given["output_length"].str.removeprefix("≤"))
    )
    return sorted(map(int, asked - set(requests["output_length"].str.removeprefix("≤"))))


def _lengths(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Average every component at every length."""
    return [
        {"num_output_tokens": length, "n": len(group)}
        | results.means(group, (*results.MEANS, *SPLIT))
        for length, group in rows.groupby(rows["num_output_tokens"].astype(int))
    ]


def _steps(rows: pd.DataFrame) -> pd.DataFrame:
    """Put every decode step of every run on a line of its own: position (from 1), ms, image."""
    known = rows[rows["decode_step_ms"].map(lambda steps: np.ndim(steps) == 1 and len(steps) > 0)]
    if known.empty:
        return pd.DataFrame({"position": [], "ms": [], "image": []})
    image = entries.clusters(known)
    return pd.concat(
        [
            pd.DataFrame({"position": np.arange(1, len(steps) + 1), "ms": steps, "image": name})
            for steps, name in zip(known["decode_step_ms"], image, strict=True)
        ],
        ignore_index=True,
    )


def _smooth(steps: pd.DataFrame) -> dict[str, list[float | None]] | None:
    """Take the median step, its interval over images, in bins of neighbouring positions."""
    from vlm_latency.statistics import percentile

    if steps.empty:
        return None
    last = steps["position"].max()
    edges = np.unique(np.linspace(0.5, last + 0.5, min(BINS, int(last)) + 1))
    groups = steps.groupby(np.digitize(steps["position"], edges))
    bins = [
        (group["position"].mean(), percentile(group["ms"], 50, clusters=group["image"]))
        for _, group in groups
    ]
    return {
        "position": [float(position) for position, _ in bins],
        "median": [median.value for _, median in bins],
        "low": [median.low for _, median in bins],
        "high": [median.high for _, median in bins],
    }
