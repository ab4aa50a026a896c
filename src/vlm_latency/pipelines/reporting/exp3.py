"""exp3: what a vision token costs, the encoder's share told apart from the decoder's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_latency.options import ExperimentOptions
from vlm_latency.pipelines.reporting import common
from vlm_latency.pipelines.reporting.exp1 import outliers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vlm_latency.statistics import Estimate

FITTED = ("T_total", "T_first_token", "T_vision_encoder", "T_projector", "T_LLM_prefill")


def report(
    options: ExperimentOptions,
    records: pd.DataFrame,
    requests: pd.DataFrame,
    coverage: dict[str, Any],
    environment: dict[str, Any],
    ceilings: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, pd.DataFrame], Figure]:
    """Report on vision tokens.

    Returns
    -------
    result, tables, figure
        ``exp3_vision_tokens_vs_latency`` as JSON, tables for people, and the figure.
    """
    from vlm_latency import statistics as st
    from vlm_latency.plots.style import Style
    from vlm_latency.plots.vision_sweep import vision_tokens_vs_latency

    # Whatever the questions of the other experiments come from, a sweep's images are made for it.
    made = bool(requests["synthetic"].fillna(False).all())
    environment = {**environment, "dataset": {**environment["dataset"], "synthetic": made}}
    rows = common.succeeded(records)
    notes: list[str] = []
    axis = f"num_vision_{options.figures.vision_axis}"
    lines = common.fits(rows, axis, FITTED, notes)
    tokens, request = rows[axis].astype(float), rows["request_id"]
    exponent = common.unless_impossible(
        notes, "exponent", st.power_law_fit, tokens, rows["T_total"], request
    )
    steps = common.unless_impossible(
        notes,
        "staircase",
        st.staircase,
        tokens,
        rows["T_vision_total"],
        rows["num_crops"].astype(float),
    )
    bend = common.unless_impossible(
        notes, "linearity", st.linearity_test, tokens, rows["T_total"], request
    )
    encoder = _crops_and_tokens(rows, "T_vision_encoder", notes)
    prefill = _crops_and_tokens(rows, "T_LLM_prefill", notes)
    found = {
        "axis": axis,
        "fits": lines,
        "exponent": exponent.exponent if exponent else None,
        "marginal_change": common.unless_impossible(
            notes, "marginal cost", st.marginal_change, tokens, rows["T_total"], request
        ),
        "staircase": steps,
        "linearity": bend,
        "encoder_per_crop": encoder.get("num_crops"),
        "encoder_per_token": encoder.get("num_vision_tokens"),
        "prefill_per_crop": prefill.get("num_crops"),
        "prefill_per_token": prefill.get("num_vision_tokens"),
        "outliers": outliers(rows),
        "notes": notes,
    }
    figure = vision_tokens_vs_latency(
        rows, found, common.context(options, environment, coverage), Style.of(options.figures)
    )
    known = rows["T_LLM_prefill"].notna()
    prefill_line = common.unless_impossible(
        notes,
        "line of T_LLM_prefill",
        st.headline_line,
        tokens[known],
        rows.loc[known, "T_LLM_prefill"],
        request[known],
    )
    prefill_line = prefill_line and prefill_line.headline
    claims = [
        st.vision_sublinear_claim(found["marginal_change"], found["exponent"]),
        st.prefill_grows_claim(
            prefill_line and prefill_line.growth(tokens.min(), tokens.max()),
            prefill_line and prefill_line.slope,
        ),
    ]
    table = common.entries(records, requests, common.COSTS)
    result = {
        "results": common.entry_dicts(table),
        "ceilings": ceilings,
        **common.frame(options, environment, coverage, found, claims),
    }
    return result, {"grids": _grids(table), "slopes": common.slopes_table(lines)}, figure


def _crops_and_tokens(rows: pd.DataFrame, column: str, notes: list[str]) -> dict[str, Estimate]:
    """Tell the cost of a crop from the cost of a token; needs grids of equal crops."""
    from vlm_latency.statistics import multi_linear_fit

    known = rows[rows[column].notna()]
    if known.empty:
        return {}
    names = ["num_crops", "num_vision_tokens"]
    fit = common.unless_impossible(
        notes,
        f"{column} over crops and tokens",
        multi_linear_fit,
        known[names].astype(float),
        known[column],
        names,
        known["request_id"],
    )
    return fit.coefficients if fit else {}


def _grids(table: pd.DataFrame) -> pd.DataFrame:
    shown = ["grid", "resolution", "num_crops", "num_vision_tokens", "num_total_tokens", "num_runs"]
    times = ["T_total", "T_vision_encoder", "T_projector", "T_LLM_prefill", "T_other"]
    return table[[*shown, *times]].reset_index(drop=True)
