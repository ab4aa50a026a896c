"""exp5: do FLOPs predict latency?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlm_latency.plots.notation import ends, interval
from vlm_latency.plots.style import (
    ALARM,
    COLOURS,
    MUTED,
    FigureContext,
    Style,
    column,
    draw_fit,
    headline,
    legend,
    nothing,
    panels,
    point_style,
    readable_log,
    small,
    whiskers,
)

SWEEPS = {"exp3": ("vision sweep", "#0072B2", "o"), "exp4": ("language sweep", "#D55E00", "^")}
UNITS = ((1e11, "T", 1e12), (1e8, "G", 1e9), (0, "M", 1e6))  # from, prefix, FLOP
# Milliseconds per TFLOP from which on they are told per GFLOP or MFLOP.
COSTS = ((1e7, "M", 1e6), (1e4, "G", 1e9), (0, "T", 1e12))
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
            context.title,
            [["exp3", "exp4", "combined"], ["regime", "held_out", "predicted"]],
            reading="Points: means of requests; whiskers and bands: 95 % intervals",
        )
        estimator = statistics["estimator"]
        draw: dict[str, tuple[str, Callable[[Axes], None]]] = {
            name: (heading, partial(_sweep, points, name, statistics.get(name), estimator))
            for name, heading in (
                ("exp3", "Vision sweep"),
                ("exp4", "Language sweep"),
                ("combined", "Both sweeps together"),
            )
        }
        draw["regime"] = (
            "What a FLOP costs, by regime",
            lambda it: _regimes(it, statistics.get("ms_per_tflop")),
        )
        draw["held_out"] = (
            "Error on shapes held out",
            lambda it: _errors(it, statistics.get("held_out_error")),
        )
        draw["predicted"] = (
            "Predicted against measured, held out",
            lambda it: _predicted(it, points),
        )
        for name, panel in axes.items():
            heading, fill = draw[name]
            headline(panel, heading)
            fill(panel)
    return figure


def _sweep(
    points: pd.DataFrame,
    name: str,
    measures: Mapping[str, Any] | None,
    estimator: str,
    axes: Axes,
) -> None:
    chosen = points if name == "combined" else points[points["sweep"] == name]
    _scatter(axes, chosen, measures, estimator)


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
    return legend(axes)


def _regimes(axes: Axes, regimes: Mapping[str, Any] | None) -> None:
    """Draw points, not bars: a logarithmic axis has no zero for them to stand on."""
    shown = {k: v for k, v in (regimes or {}).items() if ends(v)[0] > 0}
    if not shown:
        return nothing(axes)
    least = min(ends(value)[0] for value in shown.values())
    prefix, scale = next((name, unit / 1e12) for start, name, unit in COSTS if least >= start)
    for i, (name, value) in enumerate(shown.items()):
        at, error = scale * ends(value)[0], whiskers(value, scale)
        axes.errorbar(at, i, xerr=error, fmt="o", color=REGIMES.get(name, MUTED), capsize=4)
        axes.annotate(
            interval(value, "", scale), (at, i), xytext=(0, 7), textcoords="offset points",
            ha="center", size=small(),
        )  # fmt: skip
    axes.set_yticks(range(len(shown)), list(shown))
    axes.set_ylim(len(shown) - 0.5, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"ms per {prefix}FLOP")
    values = [scale * end for value in shown.values() for end in ends(value) if end and end > 0]
    if max(values) / min(values) > 10:
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 4, max(values) * 4)  # the numbers are wider than the points
        readable_log(axes.xaxis)
    else:
        axes.set_xlim(0, 1.3 * max(values))
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
    return legend(axes)
