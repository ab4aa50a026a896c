"""exp5: do FLOPs predict latency?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlm_latency.plots.notation import ends, interval, number
from vlm_latency.plots.style import (
    ALARM,
    COLOURS,
    MUTED,
    FigureContext,
    Style,
    column,
    draw_fit,
    headline,
    headroom,
    nothing,
    panels,
    point_style,
    readable_log,
    small,
    whiskers,
)

SWEEPS = {"exp3": ("vision sweep", "#0072B2", "o"), "exp4": ("language sweep", "#D55E00", "^")}
UNITS = ((1e11, "T", 1e12), (1e8, "G", 1e9), (0, "M", 1e6))  # from, prefix, FLOP
REGIMES = {
    "encoder": COLOURS["T_vision_encoder"],
    "prefill": COLOURS["T_LLM_prefill"],
    "decode": COLOURS["T_LLM_decode"],
}
PREDICTORS = {
    "flops": "FLOPs alone",
    "tokens": "tokens",
    "roofline_nominal": "roofline, nominal peaks",
    "roofline_calibrated": "roofline, calibrated",
}


def flops_vs_latency(
    points: pd.DataFrame, statistics: Mapping[str, Any], context: FigureContext, style: Style
) -> Figure:
    """Draw latency over FLOPs for both sweeps and together, and what predicts it better.

    Parameters
    ----------
    points : DataFrame
        One row per entry: `sweep` ("exp3" or "exp4"), `flops` (FLOP), `latency_ms`, and,
        optional, the held-out predictions `predicted_flops`, `predicted_roofline_calibrated` (ms).
    statistics : mapping
        `exp3`, `exp4`, `combined`: each with `r_squared`, `pearson`, `spearman` (estimates or
        numbers) and `fit` (`statistics.BandedFit`, ms over FLOP), or None;
        `ms_per_tflop`, optional: estimates by `encoder`, `prefill`, `decode`; `held_out_error`,
        optional: mean absolute errors (estimates, 1 is 100 %) by `flops`, `tokens`, `roofline_nominal`,
        `roofline_calibrated`; `estimator`: name of the FLOPs' estimator.
    """
    with style.applied():
        figure, axes = panels(
            style,
            context,
            _title(statistics, context),
            [["exp3", "exp4", "combined"], ["regime", "error", "predicted"]],
        )
        for name in ("exp3", "exp4", "combined"):
            label = SWEEPS[name][0].capitalize() if name in SWEEPS else "Both sweeps together"
            headline(axes[name], label)
            chosen = points if name == "combined" else points[points["sweep"] == name]
            _scatter(axes[name], chosen, statistics.get(name), statistics["estimator"])
        headline(axes["regime"], "What a TFLOP costs, by regime")
        _regimes(axes["regime"], statistics.get("ms_per_tflop"))
        headline(axes["error"], "Error on shapes held out")
        _errors(axes["error"], statistics.get("held_out_error"))
        headline(axes["predicted"], "Predicted against measured, held out")
        _predicted(axes["predicted"], points)
    return figure


def _title(statistics: Mapping[str, Any], context: FigureContext) -> str:
    said = []
    regimes = {
        name: ends(value)[0]
        for name, value in (statistics.get("ms_per_tflop") or {}).items()
        if ends(value)[0] > 0
    }
    if {"encoder", "decode"} <= set(regimes):
        ratio = regimes["decode"] / regimes["encoder"]
        said.append(f"a TFLOP of decode costs {number(ratio)} times one of the encoder")
    errors = statistics.get("held_out_error") or {}
    if "flops" in errors:
        said.append(f"FLOPs alone miss by {interval(errors['flops'], '%', 100)}")
    if "roofline_calibrated" in errors:
        calibrated = interval(errors["roofline_calibrated"], "%", 100)
        said.append(f"the calibrated roofline by {calibrated}")
    if not errors and statistics.get("combined"):
        said.append(f"R² over both sweeps is {interval(statistics['combined']['r_squared'])}")
    return f"{context.model}: {', '.join(said) or 'latency against FLOPs'}"


def _scatter(
    axes: Axes, points: pd.DataFrame, measures: Mapping[str, Any] | None, estimator: str
) -> None:
    flops, latency = column(points, "flops"), column(points, "latency_ms")
    known = np.isfinite(flops) & np.isfinite(latency)
    if not known.any():
        return nothing(axes)
    largest = flops[known].max()
    prefix, unit = next((name, unit) for least, name, unit in UNITS if largest >= least)
    flops = flops / unit
    for name, (label, colour, marker) in SWEEPS.items():
        chosen = known & (points["sweep"] == name).to_numpy()
        if chosen.any():
            style = point_style(int(chosen.sum()))
            axes.scatter(
                flops[chosen], latency[chosen], color=colour, marker=marker, label=label, **style
            )
    if measures:
        draw_fit(axes, measures["fit"], "black", "linear fit", unit=unit)
        for key, label in (("r_squared", "R²"), ("pearson", "Pearson"), ("spearman", "Spearman")):
            value = measures.get(key)
            # A number without an interval keeps its digits: an R² of 0.9996 is not 1.
            shown = f"{value:.4g}" if isinstance(value, float) else interval(value)
            axes.plot([], [], " ", label=f"{label} {shown}")
    axes.set(xlabel=f"{prefix}FLOP ({estimator.replace('_', ' ')})", ylabel="latency (ms)")
    axes.locator_params(axis="x", nbins=5)
    axes.set_ylim(bottom=0)
    headroom(axes, 6)
    axes.legend(loc="upper left")
    return None


def _regimes(axes: Axes, regimes: Mapping[str, Any] | None) -> None:
    shown = {k: v for k, v in (regimes or {}).items() if np.isfinite(ends(v)[0])}
    if not shown:
        return nothing(axes)
    for i, (name, value) in enumerate(shown.items()):
        height, error = ends(value)[0], whiskers(value)
        axes.bar(i, height, 0.6, yerr=error, color=REGIMES.get(name, MUTED), capsize=4)
        axes.annotate(
            interval(value).replace(" ", "\n"),
            (i, height + float(error[1, 0])),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            size=small(),
        )
    axes.set_xticks(range(len(shown)), list(shown))
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("ms per TFLOP")
    heights = [ends(value)[0] for value in shown.values()]
    if min(heights) > 0 and max(heights) / min(heights) > 30:
        axes.set_yscale("log")
    else:
        axes.yaxis.set_major_formatter("{x:,.15g}")
    axes.margins(x=0.15)
    headroom(axes, 3)
    return None


def _errors(axes: Axes, errors: Mapping[str, Any] | None) -> None:
    shown = {k: v for k, v in (errors or {}).items() if np.isfinite(ends(v)[0])}
    if not shown:
        return nothing(axes)
    reach = 0.0
    for i, (name, value) in enumerate(shown.items()):
        width, error = 100 * ends(value)[0], whiskers(value, 100)
        colour = ALARM if name == "flops" else COLOURS["T_first_token"]
        axes.barh(i, width, 0.6, xerr=error, color=colour, alpha=0.8, capsize=3)
        end = width + float(error[1, 0])
        reach = max(reach, end)
        axes.annotate(
            interval(value, "%", 100),
            (end, i),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            size=small(),
        )
    names = [PREDICTORS.get(name, name).replace(", ", ",\n") for name in shown]
    axes.set_yticks(range(len(shown)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="mean absolute error (%)", xlim=(0, 1.75 * reach or 1.0))
    return None


def _predicted(axes: Axes, points: pd.DataFrame) -> None:
    measured = column(points, "latency_ms")
    drawn = []
    for name, colour, marker in (
        ("flops", ALARM, "x"),
        ("roofline_calibrated", COLOURS["T_first_token"], "o"),
    ):
        predicted = column(points, f"predicted_{name}")
        known = (measured > 0) & (predicted > 0)
        if known.any():
            drawn += [measured[known], predicted[known]]
            axes.scatter(
                measured[known],
                predicted[known],
                color=colour,
                marker=marker,
                label=PREDICTORS[name],
                s=14,
                alpha=0.7,
                linewidths=1.0 if marker == "x" else 0,
            )
    if not drawn:
        return nothing(axes)
    limits = np.array([min(v.min() for v in drawn), max(v.max() for v in drawn)])
    axes.plot(limits, limits, color="black", linewidth=0.8, label="as measured")
    axes.fill_between(limits, 0.9 * limits, 1.1 * limits, color="black", alpha=0.1, label="± 10 %")
    axes.set(xscale="log", yscale="log", xlabel="measured (ms)", ylabel="predicted (ms)")
    readable_log(axes.xaxis, axes.yaxis)
    axes.legend(loc="upper left")
    return None
