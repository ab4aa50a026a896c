"""Which statistic of the table stands for which public interval; a test compares both lists."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator

import pandas as pd

from vlm_latency import statistics as st

# Claims carry the estimates that they are given; the table judges their verdicts.
GIVEN = (st.Claim,)


def public_intervals() -> set[str]:
    """Name every `Estimate` that a public function, or a method of its result, returns."""
    found = set()
    for name in st.__all__:
        thing = getattr(st, name)
        if inspect.isfunction(thing):
            found |= {name + path for path in _paths(_hints(thing).get("return"))}
        elif inspect.isclass(thing) and thing not in GIVEN:
            for method, function in vars(thing).items():
                if inspect.isfunction(function) and not method.startswith("_"):
                    returned = _hints(function).get("return")
                    found |= {f"{name}.{method}{path}" for path in _paths(returned)}
    return found


def _hints(thing: object) -> dict[str, object]:
    return typing.get_type_hints(thing, localns={"pd": pd})


def _paths(hint: object) -> Iterator[str]:
    if hint is st.Estimate:
        yield ""
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint) and hint not in GIVEN:
        hints = _hints(hint)
        for field in dataclasses.fields(hint):
            yield from (f".{field.name}{path}" for path in _paths(hints[field.name]))
    elif isinstance(hint, types.UnionType | types.GenericAlias) or typing.get_origin(hint):
        for argument in typing.get_args(hint):
            yield from _paths(argument)


# Public interval → the statistic of the table that simulates it (", over images" aside).
COVERED = {
    "CrossValidation.error_ratio": "ratio of two held-out errors",
    "CrossValidation.interval": "predicted latency of one request",
    "LinearFit.banded.intercept": "intercept, least squares",
    "LinearFit.banded.slope": "slope, least squares",
    "LinearFit.growth": "line, end / start",
    "a_a_false_alarms.share": "share of false alarms",
    "between_sessions.components.ratio": "two sessions: no verdict but SAME or UNDECIDED",
    "compare_paired.ratio": "ratio of interleaved pairs",
    "compare_tables.components.ratio": "ratio of matched requests",
    "correlations.pearson": "Pearson's r",
    "correlations.spearman": "Spearman's rho",
    "cross_validate.mape": "held-out error of costs",
    "cross_validate.median_error": "median held-out error",
    "floor_and_line.floor": "floor and line: floor",
    "floor_and_line.free": "floor and line: free",
    "floor_and_line.slope": "floor and line: slope",
    "headline_line.least_squares.intercept": "intercept, least squares",
    "headline_line.least_squares.slope": "slope, headline of the two",
    "headline_line.robust.intercept": "intercept, robust",
    "headline_line.robust.slope": "slope, headline of the two",
    "iso_pairs.median_ratio": "median ratio of iso-FLOP pairs",
    "linear_fit.intercept": "intercept, least squares",
    "linear_fit.slope": "slope, least squares",
    "marginal_change": "change of the cost per token",
    "mean_estimate": "mean",
    "multi_linear_fit.coefficients": "ms per crop beside ms per token",
    "multi_linear_fit.intercept": "intercept beside two slopes",
    "percentile": "P50",
    "power_law_fit.exponent": "exponent of a power law",
    "power_law_fit.scale": "scale of a power law",
    "rank_inversions": "share of rank inversions",
    "ratio_estimate": "ratio of means",
    "robust_line.intercept": "intercept, robust",
    "robust_line.slope": "slope, robust",
    "staircase.break_points.jump": "jump of a staircase",
    "summary.P50": "P50",
    "summary.P95": "P95",
    "summary.P99": "P99",
    "summary.mean": "mean",
    "summary.tail_ratio": "P99 / P50",
    "tail_ratio": "P99 / P50",
    "transfer_error": "transfer error of one fit",
    "variance_budget.shares": "share of variance: noise",
    "variance_budget.tail_content": "share of the tail in the content",
}

# Headline number of a report (experiment, its fact's path) → the statistic that simulates it; of
# the data's size in a default run there is a cell.
HEADLINES = {
    ("exp1", "T_total", "P50"): "P50, over images",
    ("exp1", "T_total", "P95"): "P95, over images",
    ("exp1", "T_total", "P99"): "P99, over images",
    ("exp1", "T_total", "tail_ratio"): "P99 / P50",
    ("exp1", "T_total", "mean"): "mean, over images",
    ("exp1", "T_first_token", "P50"): "P50, over images",
    ("exp1", "accuracy"): "mean, over images",
    ("exp2", "means", "T_total"): "mean",
    ("exp2", "means", "T_preprocess"): "mean",
    ("exp2", "shares", "T_vision_encoder"): "ratio of means",
    ("exp2", "shares", "T_projector"): "ratio of means",
    ("exp2", "shares", "T_LLM_prefill"): "ratio of means",
    ("exp2", "shares", "T_LLM_decode"): "ratio of means",
    ("exp2", "llm_share"): "ratio of means",
    ("exp3", "fits", "T_total", "slope"): "slope, headline of the two",
    ("exp3", "fits", "T_LLM_prefill", "slope"): "slope, headline of the two",
    ("exp3", "encoder_per_crop"): "ms per crop beside ms per token",
    ("exp3", "prefill_per_token"): "ms per crop beside ms per token",
    ("exp3", "exponent"): "exponent of a power law",
    ("exp4", "fits", "T_LLM_decode", "slope"): "slope, headline of the two",
    ("exp4", "prefill"): "mean, over images",
    ("exp4", "step_growth"): "last decode step / first",
    ("exp4", "exponent"): "exponent of a power law",
    ("exp5", "held_out_error", "flops"): "held-out error of flops",
    ("exp5", "held_out_error", "tokens"): "held-out error of costs",
    ("exp5", "held_out_error", "roofline_nominal"): "held-out error of costs",
    ("exp5", "held_out_error", "roofline_calibrated"): "held-out error of costs",
}
# Facts that are words, counts or descriptions (R²), without an interval.
PLAIN = {
    ("exp1", "variance_budget", "sentence"),
    ("exp3", "linearity"),
    ("exp3", "staircase"),
    ("exp4", "dropped_lengths"),
    ("exp5", "exp3", "r_squared"),
    ("exp5", "exp4", "r_squared"),
    ("exp5", "combined", "r_squared"),
    ("exp5", "verdict"),
    ("exp6", "finding"),
    ("exp6", "identity"),
    ("exp6", "realised"),
    ("exp6", "refused"),
}
