"""exp4: latency against the number of output tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlm_latency.plots.notation import LABELS, ends, interval
from vlm_latency.plots.style import (
    COLOURS,
    FigureContext,
    Style,
    column,
    draw_fit,
    headline,
    legend,
    nothing,
    panels,
    point_style,
    small,
    whiskers,
)
from vlm_latency.records import ok_rows

if TYPE_CHECKING:
    from vlm_latency.statistics import BandedFit, Estimate

WHOLE, SPLIT = ("T_LLM_decode",), ("T_LLM_decode_forward", "T_LLM_decode_between")
STACK = ("T_vision_total", "T_LLM_prefill", *WHOLE, *SPLIT, "T_other")
HEADINGS = {
    "decode": "LLM decode against output tokens",
    "total": "Whole request, over the time to its first token",
    "stack": "Composition by output length, with 95 % intervals of the total",
    "steps": "Does a step get slower as the cache grows?",
}


def language_tokens_vs_latency(
    records: pd.DataFrame, statistics: Mapping[str, Any], context: FigureContext, style: Style
) -> Figure:
    """Draw decode and total against output tokens, their stack, and the steps by position.

    Parameters
    ----------
    records : DataFrame
        Reads `num_output_tokens`, `T_LLM_decode`, `T_total` (ms), `decode_step_ms` (a list of
        milliseconds per run) and `status`.
    statistics : mapping
        `fits`: `statistics.BandedFit` by column name (`T_LLM_decode`, `T_total`), ms per output
        token; `lengths`: list of dicts with `num_output_tokens`, `n` and estimates (ms) under
        `T_total`, `T_vision_total`, `T_LLM_prefill`, `T_LLM_decode` (or its parts
        `T_LLM_decode_forward` and `T_LLM_decode_between`), `T_other`; `prefill`, optional:
        estimate (ms) of T_first_token, the baseline; `steps`, optional: dict of lists `position`,
        `median`, `low`, `high` (ms), smoothed; `first_step`, optional: estimate (ms) of the first
        decode step, which is told apart.
    """
    rows = ok_rows(records)
    fits = statistics["fits"]
    with style.applied():
        figure, axes = panels(
            style,
            context,
            context.title,
            [["decode", "total"], ["stack", "steps"]],
            panel=(5.0, 3.1),
            reading=(
                f"Points: {len(rows):,} runs, in the last panel their decode steps; bands and "
                "whiskers: 95 % intervals, clustered by image"
            ),
        )
        draw: dict[str, Callable[[Axes], None]] = {
            "decode": lambda it: _line(it, rows, fits, "T_LLM_decode"),
            "total": lambda it: _line(it, rows, fits, "T_total", statistics.get("prefill")),
            "stack": lambda it: _stack(it, statistics["lengths"]),
            "steps": lambda it: _steps(it, rows, statistics),
        }
        for name, panel in axes.items():
            headline(panel, HEADINGS[name])
            draw[name](panel)
    return figure


def _line(
    axes: Axes,
    rows: pd.DataFrame,
    fits: Mapping[str, BandedFit],
    name: str,
    baseline: Estimate | None = None,
) -> None:
    x, y = column(rows, "num_output_tokens"), column(rows, name)
    known = np.isfinite(x) & np.isfinite(y)
    if not known.any():
        return nothing(axes)
    axes.scatter(x[known], y[known], color=COLOURS[name], **point_style(int(known.sum())))
    fit = fits.get(name)
    label = f"line: {interval(fit.slope, 'ms')} per token" if fit else ""
    draw_fit(axes, fit, COLOURS[name], label)
    if baseline is not None:
        value, low, high = ends(baseline)
        colour = COLOURS["T_first_token"]
        label = f"time to first token: {interval(baseline, 'ms')}"
        axes.axhline(value, color=colour, linestyle="--", label=label)
        if low is not None and high is not None:
            axes.axhspan(low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="output tokens", ylabel=f"{name} (ms)")
    axes.set_ylim(bottom=min(0.0, float(y[known].min())))
    return legend(axes)


def _stack(axes: Axes, lengths: list[Mapping[str, Any]]) -> None:
    split = any("T_LLM_decode_forward" in row for row in lengths)
    stack = [name for name in STACK if name not in (WHOLE if split else SPLIT)]
    parts = [name for name in stack if any(ends(row.get(name))[0] > 0 for row in lengths)]
    if not parts:
        return nothing(axes, "components not separable")
    at = np.arange(len(lengths))
    bottom = np.zeros(len(lengths))
    for name in parts:
        height = np.array([max(0.0, np.nan_to_num(ends(row.get(name))[0])) for row in lengths])
        axes.bar(at, height, 0.7, bottom=bottom, color=COLOURS[name], label=LABELS[name])
        bottom += height
    totals = np.array([ends(row.get("T_total"))[0] for row in lengths])
    errors = np.hstack([whiskers(row.get("T_total")) for row in lengths])
    axes.errorbar(at, totals, yerr=errors, fmt="none", color="black", capsize=3)
    for i, (row, error) in enumerate(zip(lengths, errors[1], strict=True)):
        decode, total = ends(row.get("T_LLM_decode"))[0], totals[i]
        if np.isfinite(decode) and total > 0:
            axes.annotate(
                f"{100 * decode / total:.0f} %",
                (i, max(total + error, bottom[i])),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                size=small(),
                color=COLOURS["T_LLM_decode"],
            )
    axes.set_xticks(at, [f"{row['num_output_tokens']:,}" for row in lengths])
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="output tokens (on top: share of decode)", ylabel="mean latency (ms)")
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    return legend(axes, reverse=True)


def _steps(axes: Axes, rows: pd.DataFrame, statistics: Mapping[str, Any]) -> None:
    listed = rows["decode_step_ms"].dropna() if "decode_step_ms" in rows else pd.Series()
    runs = [np.asarray(run, dtype=float) for run in listed if len(run)]
    if not runs:
        return nothing(axes, "steps not measured")
    position = np.concatenate([np.arange(1, run.size + 1) for run in runs])
    times = np.concatenate(runs)
    first = position == 1
    dots = point_style(times.size)
    axes.scatter(position[~first], times[~first], color=COLOURS["T_LLM_decode"], **dots)
    said = statistics.get("first_step")
    axes.scatter(
        position[first], times[first], marker="D", s=14, facecolors="none",
        edgecolors=COLOURS["T_vision_encoder"], linewidths=0.8, zorder=4,
        label="first step after the prefill" + (f": {interval(said, 'ms')}" if said else ""),
    )  # fmt: skip
    if steps := statistics.get("steps"):
        lower, upper = (np.array(steps[key], dtype=float) for key in ("low", "high"))
        axes.plot(steps["position"], steps["median"], color="black", label="running median")
        if np.isfinite(lower + upper).any():
            axes.fill_between(
                steps["position"], lower, upper, color="black", alpha=0.25, linewidth=0,
                label="its 95 % interval",
            )  # fmt: skip
    low, middle, high = np.percentile(times, [0.5, 50, 99.5])
    margin = (high - low) / 4 or 0.1 * middle or 1.0
    bottom, top = max(0.0, low - margin), high + margin
    axes.set_ylim(bottom, top)
    if beyond := int(((times < bottom) | (times > top)).sum()):
        axes.plot([], [], " ", label=f"{beyond:,} of {times.size:,} steps lie outside this view")
    axes.set(xlabel="position of the output token", ylabel="decode step (ms)")
    return legend(axes)
