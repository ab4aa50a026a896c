"""exp5: do FLOPs predict latency, and what does it better?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vlm_latency.errors import DataError, blaming
from vlm_latency.options import ExperimentOptions
from vlm_latency.pipelines.reporting import entries, results
from vlm_latency.plots.notation import interval
from vlm_latency.records import ESTIMATORS, SHAPE
from vlm_latency.results import entry_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vlm_latency.statistics import Claim, Estimate

SWEEPS = {"exp3": "num_vision_tokens", "exp4": "num_output_tokens"}
# What a TFLOP costs where: regime → (sweep, part).
REGIMES = {
    "encoder": ("exp3", "vision", "T_vision_encoder"),
    "prefill": ("exp3", "llm_prefill", "T_LLM_prefill"),
    "decode": ("exp4", "llm_decode", "T_LLM_decode"),
}


@blaming("the result of exp3 or exp4", "as 'kedro run' writes it")
def report(
    options: ExperimentOptions,
    vision: dict[str, Any],
    language: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, pd.DataFrame], Figure]:
    """Report on FLOPs and latency, from the results of exp3 and exp4.

    Parameters
    ----------
    vision, language
        The results of exp3 and exp4, ours or the seed's. Ours say what the machine that measured
        them can do at most, which the roofline needs.

    Returns
    -------
    result, tables, figure
        ``exp5_flops_vs_latency`` as JSON, tables for people, and the figure.
    """
    from vlm_latency import statistics as st
    from vlm_latency.plots.flops import flops_vs_latency
    from vlm_latency.plots.style import Style

    notes: list[str] = []
    own = options.flops.estimator
    sweeps = {"exp3": vision, "exp4": language}
    _same_model(sweeps)
    points = pd.concat(
        [entry_table(data, name).assign(sweep=name) for name, data in sweeps.items()],
        ignore_index=True,
    )
    points = _chosen_flops(points, own, notes)
    environment, marks = _environment(sweeps, notes)
    estimators = {
        name: _association(points, f"flops_total{suffix}", notes)
        for name, suffix in ESTIMATORS.items()
        if f"flops_total{suffix}" in points
    }
    ceilings = vision.get("ceilings") or language.get("ceilings") or {}
    held_out, points = _held_out(points, environment, ceilings, notes)
    found: dict[str, Any] = {
        **_association(points, "flops_total", notes),
        "estimator": own,
        "estimators": estimators,
        "ms_per_tflop": _regimes(points, notes),
        "transfer": _transfer(points, notes),
        "rank_inversions": _on_shapes(points, st.rank_inversions, "rank inversions", notes),
        "iso_flop_pairs": _iso(points, notes),
        "held_out_error": held_out.get("mape"),
        "held_out_median_error": held_out.get("median_error"),
        "held_out_shapes": held_out.get("n_groups"),
        "notes": notes,
    }
    claim = st.flops_imperfect_claim(held_out.get("flops"), held_out.get("ratio"))
    found["verdict"] = _verdict(found, claim)
    finding = _finding(found, claim)
    coverage = {name: data.get("coverage") for name, data in sweeps.items()}
    costs = dict.fromkeys(x for one in coverage.values() for x in (one or {}).get("costs", ()))
    known = {"partial": False, "costs": [*costs]}
    context = results.context(options, environment, known, finding)
    context = replace(context, marks=(*context.marks, *marks))
    drawn = points.rename(columns={"flops_total": "flops", "T_total": "latency_ms"})
    figure = flops_vs_latency(drawn, found, context, Style.of(options.figures))
    result = {
        **{
            name: {
                "flops": points.loc[points["sweep"] == name, "flops_total"].tolist(),
                "latencies": points.loc[points["sweep"] == name, "T_total"].tolist(),
                column.removeprefix("num_"): points.loc[
                    points["sweep"] == name, column if column in points else "num_vision_patches"
                ].tolist(),
            }
            for name, column in SWEEPS.items()
        },
        **results.frame(options, environment, coverage, found, [claim], finding),
    }
    tables = {
        "paper": results.paper_table("exp5", found),
        "predictors": _predictors(held_out),
        "association": _table(estimators),
    }
    return result, tables, figure


def _same_model(sweeps: Mapping[str, dict[str, Any]]) -> None:
    """Refuse results of two models: a line through both is about neither."""
    models = [(data.get("environment") or {}).get("model") or {} for data in sweeps.values()]
    names = [model.get("name") for model in models]
    if None not in names and len(set(names)) > 1:
        said = " and ".join(f"{sweep} of {name}" for sweep, name in zip(sweeps, names, strict=True))
        raise DataError(
            f"found results of two models, {said}; expected both of one: give "
            "exp5.vision_results and exp5.language_results of the same model"
        )


def _chosen_flops(points: pd.DataFrame, estimator: str, notes: list[str]) -> pd.DataFrame:
    """Put the chosen estimator's numbers into ``flops_*``, where the results have it."""
    suffix = ESTIMATORS[estimator]
    chosen = {
        name.removesuffix(suffix): points[name]
        for name in map(str, points)
        if name.startswith("flops_") and name.endswith(suffix)
    }
    if not chosen:
        notes.append(f"the results have no {estimator} FLOPs: flops_* are used as they stand there")
    kept = points.drop(columns=[name for name in chosen if name in points])
    points = kept.join(pd.DataFrame(chosen))
    known = points["flops_total"].notna() & points["T_total"].notna()
    if not known.any():
        raise DataError(
            "the results of exp3 and exp4 have no entry with both flops_total and T_total"
        )
    return points[known].astype({"flops_total": float, "T_total": float}).reset_index(drop=True)


def _environment(
    sweeps: dict[str, dict[str, Any]], notes: list[str]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Take the environment of the two results; where they differ, say so on everything."""
    known = [data["environment"] for data in sweeps.values() if data.get("environment")]
    unknown = {
        "line": "environment not recorded",
        "model": {"name": "unknown model", "weights": None},
        "dataset": {},
    }
    environment = {**unknown, **known[0]} if known else unknown
    conditions = [item.get("conditions", {}) for item in known]
    differing = []
    if len(known) == 2:
        first, second = conditions
        differing = [
            key
            for key in sorted({*first, *second} - {"measurement"})
            if first.get(key) != second.get(key)
        ]
    if len(known) < len(sweeps):
        notes.append("not both results record their environment: they may differ")
    if differing:
        notes.append(f"the two results were measured in another {', '.join(differing)}")
        return environment, (f"two environments: {', '.join(differing)} differ",)
    return environment, ()


def _association(points: pd.DataFrame, column: str, notes: list[str]) -> dict[str, Any]:
    """Correlate FLOPs and latency within each sweep and over both, as the seed did."""
    from vlm_latency import statistics as st

    found: dict[str, Any] = {}
    for name in (*SWEEPS, "combined"):
        rows = points if name == "combined" else points[points["sweep"] == name]
        rows = rows[rows[column].notna()]
        x, y = rows[column].astype(float), rows["T_total"]
        fit = results.unless_impossible(
            notes, f"{name}: line", st.linear_fit, x, y, entries.clusters(rows)
        )
        both = results.unless_impossible(notes, f"{name}: correlation", st.correlations, x, y)
        if fit is None or both is None:
            found[name] = None
            continue
        found[name] = {
            "r_squared": fit.r_squared,
            "pearson": both.pearson,
            "spearman": both.spearman,
            "slope": fit.slope.value,
            "intercept": fit.intercept.value,
            "fit": fit.banded(x),
            "n": len(rows),
        }
    return found


def _regimes(points: pd.DataFrame, notes: list[str]) -> dict[str, Estimate]:
    """What a TFLOP takes in the encoder, in prefill and in decode, milliseconds."""
    from vlm_latency.statistics import ratio_estimate

    found = {}
    for regime, (sweep, part, time) in REGIMES.items():
        column = f"flops_{part}"
        rows = points[points["sweep"] == sweep]
        if not {column, time} <= set(points):
            continue
        rows = rows[(rows[column] > 0) & rows[time].notna()]
        if rows.empty:
            continue
        ratio = results.unless_impossible(
            notes,
            f"ms per TFLOP in {regime}",
            ratio_estimate,
            rows[time].astype(float),
            rows[column].astype(float) / 1e12,
            entries.clusters(rows),
        )
        if ratio is not None:
            found[regime] = ratio
    return found


def _transfer(points: pd.DataFrame, notes: list[str]) -> dict[str, Estimate | None]:
    """Fit FLOPs on one sweep, predict the other: the mean absolute error as a share."""
    from vlm_latency.costs.prediction import shapes
    from vlm_latency.statistics import nnls_relative_fit, transfer_error

    found = {}
    for train, test in (("exp3", "exp4"), ("exp4", "exp3")):
        sides = [
            (
                np.column_stack([np.ones((points["sweep"] == name).sum()), rows["flops_total"]]),
                rows["T_total"],
            )
            for name in (train, test)
            for rows in [points[points["sweep"] == name]]
        ]
        error = results.unless_impossible(
            notes,
            f"{train} predicts {test}",
            transfer_error,
            nnls_relative_fit,
            *sides,
            shapes(points[points["sweep"] == test]),
        )
        found[f"{train} predicts {test}"] = error
    return found


def _shape_means(points: pd.DataFrame) -> pd.DataFrame:
    """Average the entries of one shape: two of them are no pair of requests that differ."""
    from vlm_latency.costs.prediction import shapes

    counts = [name for name in SHAPE if name in points and points[name].notna().all()]
    wanted = dict.fromkeys((*counts, "flops_total", "T_total"), "mean") | {"sweep": "first"}
    return points.groupby(shapes(points)).agg(wanted)


def _on_shapes(points: pd.DataFrame, compute: Any, what: str, notes: list[str]) -> Any:
    shapes = _shape_means(points)
    return results.unless_impossible(notes, what, compute, shapes["flops_total"], shapes["T_total"])


def _iso(points: pd.DataFrame, notes: list[str]) -> dict[str, Any] | None:
    """Find shapes of nearly equal FLOPs whose latency differs, and name the farthest pair."""
    from vlm_latency.statistics import iso_pairs

    shapes = _shape_means(points)
    found = results.unless_impossible(
        notes, "iso-FLOP pairs", iso_pairs, shapes["flops_total"], shapes["T_total"], 0.05
    )
    if found is None:
        return None
    named = dict(vars(found))
    if found.max_pair is not None:
        named["max_pair"] = shapes.iloc[list(found.max_pair)].to_dict("records")
    return named


def _held_out(
    points: pd.DataFrame,
    environment: dict[str, Any],
    ceilings: dict[str, Any],
    notes: list[str],
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Predict every shape from the others by FLOPs, tokens and the roofline."""
    from vlm_latency.costs import Hardware, known_device
    from vlm_latency.costs.prediction import predictors, shapes
    from vlm_latency.statistics import cross_validate

    needed = [*SHAPE, "T_total"]
    if not set(needed) <= set(points) or points[needed].isna().any(axis=None):
        notes.append("held-out errors need the token counts of every entry: left out")
        return {}, points
    if not ceilings:
        notes.append("the results do not say what their machine can do at most: no roofline")
        return {}, points
    dtype = environment["model"].get("dtype") or ceilings["dtype"]
    looked_at = predictors(points, Hardware.from_ceilings(ceilings), dtype)
    if published := known_device(ceilings.get("device_name", "")):
        nominal = predictors(points, published, dtype)
        looked_at |= {name: nominal[name] for name in ("roofline_nominal",) if name in nominal}
    groups = shapes(points)
    found = results.unless_impossible(
        notes, "held-out errors", cross_validate, groups, looked_at, points["T_total"]
    )
    if found is None:
        return {}, points
    best = "roofline_calibrated" if "roofline_calibrated" in looked_at else "tokens"
    predicted = {f"predicted_{name}": values for name, values in found.predicted.items()}
    return {
        "mape": found.mape,
        "median_error": found.median_error,
        "n_groups": found.n_groups,
        "flops": found.mape["flops"],
        "ratio": found.error_ratio("flops", best),
    }, points.join(pd.DataFrame(predicted, index=points.index))


SAID = {
    "supported": "FLOPs alone do not predict latency",
    "contradicted": "FLOPs alone predict latency",
    "undecided": "whether FLOPs alone predict latency cannot be said from these data",
}


def _finding(found: dict[str, Any], claim: Claim) -> str:
    """Say what the claim's verdict allows."""
    errors = found["held_out_error"] or {}
    said = [SAID[claim.verdict]]
    if "flops" in errors:
        said.append(f"they miss held-out shapes by {interval(errors['flops'], '%', 100)}")
    if "roofline_calibrated" in errors:
        calibrated = interval(errors["roofline_calibrated"], "%", 100)
        said.append(f"the calibrated roofline by {calibrated}")
    return f"{said[0]}: {', '.join(said[1:])}" if len(said) > 1 else said[0]


def _verdict(found: dict[str, Any], claim: Claim) -> str:
    """Answer the question in a sentence; the numbers decide which."""
    errors = found["held_out_error"]
    if not errors:
        combined = found.get("combined")
        r_squared = f"R² over both sweeps is {combined['r_squared']:.3f}" if combined else "no line"
        return f"{r_squared}; held-out errors could not be computed, so the question stays open."
    said = SAID[claim.verdict]
    said = said[0].upper() + said[1:]
    parts = [f"{name.replace('_', ' ')} {100 * e.value:.1f} %" for name, e in errors.items()]
    regimes = found["ms_per_tflop"]
    spread = ""
    if len(regimes) > 1:
        worst, best = (pick(regimes, key=lambda k: regimes[k].value) for pick in (max, min))
        low, high = (interval(regimes[name], "ms") for name in (best, worst))
        spread = f" A TFLOP of {worst} costs {high}, one of {best} {low}."
    pairs = found["iso_flop_pairs"]
    if pairs and pairs["n_pairs"]:
        median, largest = interval(pairs["median_ratio"]), pairs["max_ratio"]
        spread += (
            f" Requests of equal FLOPs (to {100 * pairs['tolerance']:.0f} %) differ {median} × "
            f"at the median of {pairs['n_pairs']} pairs, {largest:.2f} × at most."
        )
    return f"{said}: mean error on held-out shapes: {', '.join(parts)}.{spread}"


def _predictors(held_out: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "predictor": name,
                "MAPE": error.value,
                "low": error.low,
                "high": error.high,
                "median error": held_out["median_error"][name].value,
            }
            for name, error in held_out.get("mape", {}).items()
        ],
        columns=["predictor", "MAPE", "low", "high", "median error"],
    )


def _table(estimators: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "estimator": estimator,
                "sweep": sweep,
                "R²": numbers["r_squared"],
                "Pearson": numbers["pearson"].value if numbers["pearson"] else None,
                "Spearman": numbers["spearman"].value if numbers["spearman"] else None,
                "n": numbers["n"],
            }
            for estimator, sweeps in estimators.items()
            for sweep, numbers in sweeps.items()
            if numbers
        ],
        columns=["estimator", "sweep", "R²", "Pearson", "Spearman", "n"],
    )
