"""exp4: latency against the number of output tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlm_latency.plots.notation import ends, interval
from vlm_latency.plots.style import (
    COLOURS,
    LABELS,
    FigureContext,
    Style,
    column,
    draw_fit,
    headline,
    headroom,
    nothing,
    ok_rows,
    panels,
    point_style,
    small,
    whiskers,
)

if TYPE_CHECKING:
    from vlm_latency.statistics import BandedFit

STACK = ("T_vision_total", "T_LLM_prefill", "T_LLM_decode", "T_other")


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
        `fits`: by column name (`T_LLM_decode`, `T_total`), as in `vision_tokens_vs_latency`, with
        the slope in ms per output token; `lengths`: list of dicts with `num_output_tokens` and
        estimates (ms) under `T_total`, `T_vision_total`, `T_LLM_prefill`, `T_LLM_decode`,
        `T_other`; `prefill`, optional: estimate (ms) of T_first_token, the baseline; `steps`,
        optional: dict of lists `position` (from 1), `median`, `low`, `high` (ms), smoothed;
        `step_growth`, optional: estimate of the last step's time over the first one's;
        `dropped_lengths`, optional: lengths that did not fit the model.
    """
    rows = ok_rows(records)
    fits = statistics["fits"]
    said = []
    if "T_LLM_decode" in fits:
        said.append(f"each output token takes {interval(fits['T_LLM_decode'].slope, 'ms')}")
    if statistics.get("step_growth") is not None:
        said.append(f"the last step takes {interval(statistics['step_growth'])} × the first")
    if dropped := statistics.get("dropped_lengths"):
        said.append(f"{', '.join(map(str, dropped))} tokens do not fit the model: left out")
    title = f"{context.model}: {'; '.join(said) or 'latency against output tokens'}"
    with style.applied():
        figure, axes = panels(
            style, context, title, [["decode", "total"], ["stack", "steps"]], panel=(5.0, 3.1)
        )
        headline(axes["decode"], "LLM decode against output tokens")
        _line(axes["decode"], rows, fits, "T_LLM_decode")
        headline(axes["total"], "Whole request, over the time to its first token")
        _line(axes["total"], rows, fits, "T_total")
        baseline = statistics.get("prefill")
        if baseline is not None:
            value, low, high = ends(baseline)
            colour = COLOURS["T_first_token"]
            label = f"time to first token: {interval(baseline, 'ms')}"
            axes["total"].axhline(value, color=colour, linestyle="--", label=label)
            if low is not None and high is not None:
                axes["total"].axhspan(low, high, color=colour, alpha=0.2, linewidth=0)
            axes["total"].legend(loc="upper left")
        headline(axes["stack"], "Composition by output length, with 95 % intervals of the total")
        _stack(axes["stack"], statistics["lengths"])
        headline(axes["steps"], "Does a step get slower as the cache grows?")
        _steps(axes["steps"], rows, statistics.get("steps"))
    return figure


def _line(axes: Axes, rows: pd.DataFrame, fits: Mapping[str, BandedFit], name: str) -> None:
    x, y = column(rows, "num_output_tokens"), column(rows, name)
    known = np.isfinite(x) & np.isfinite(y)
    if not known.any():
        return nothing(axes)
    axes.scatter(x[known], y[known], color=COLOURS[name], **point_style(int(known.sum())))
    fit = fits.get(name)
    label = f"line: {interval(fit.slope, 'ms')} per token" if fit else ""
    draw_fit(axes, fit, COLOURS[name], label)
    axes.set(xlabel="output tokens", ylabel=f"{name} (ms)")
    axes.set_ylim(bottom=min(0.0, float(y[known].min())))
    headroom(axes, 2)
    if fit:
        axes.legend(loc="upper left")
    return None


def _stack(axes: Axes, lengths: list[Mapping[str, Any]]) -> None:
    parts = [name for name in STACK if any(ends(row.get(name))[0] > 0 for row in lengths)]
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
    if totals[0] > 0.4 * np.nanmax(totals):  # the legend would lie on the first bars
        headroom(axes, len(parts))
    axes.legend(loc="upper left", reverse=True)
    return None


def _steps(axes: Axes, rows: pd.DataFrame, steps: Mapping[str, Any] | None) -> None:
    listed = rows["decode_step_ms"].dropna() if "decode_step_ms" in rows else pd.Series()
    runs = [np.asarray(run, dtype=float) for run in listed if len(run)]
    if not runs:
        return nothing(axes, "steps not measured")
    position = np.concatenate([np.arange(1, run.size + 1) for run in runs])
    times = np.concatenate(runs)
    axes.scatter(position, times, color=COLOURS["T_LLM_decode"], **point_style(times.size))
    if steps:
        lower, upper = (np.array(steps[key], dtype=float) for key in ("low", "high"))
        axes.fill_between(steps["position"], lower, upper, color="black", alpha=0.25, linewidth=0)
        axes.plot(steps["position"], steps["median"], color="black", label="running median")
    low, middle, high = np.percentile(times, [0.5, 50, 99.5])
    margin = (high - low) / 2 or 0.1 * middle or 1.0
    bottom, top = max(0.0, low - margin), high + margin
    axes.set_ylim(bottom, top)
    if beyond := int(((times < bottom) | (times > top)).sum()):
        axes.plot([], [], " ", label=f"{beyond:,} of {times.size:,} steps lie outside this view")
    axes.set(xlabel="position of the output token", ylabel="decode step (ms)")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="lower right")
    return None
