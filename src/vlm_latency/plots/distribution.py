"""exp1: how latency is distributed over requests, and where its tail comes from."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vlm_latency.plots.notation import ends, interval, number
from vlm_latency.plots.style import (
    ALARM,
    COLOURS,
    LABELS,
    FigureContext,
    Style,
    column,
    headline,
    headroom,
    jitter,
    nothing,
    ok_rows,
    panels,
    point_style,
    small,
    whiskers,
)

if TYPE_CHECKING:
    from vlm_latency.statistics import Estimate, Summary, VarianceBudget

PERCENTILES = {"P50": "#009E73", "P95": "#E69F00", "P99": "#D55E00"}
LOG_RATIO = 30  # a range wider than this is drawn on a logarithmic axis
SOURCES = {
    "content": "The tail lies in the content",
    "machine": "The tail lies in the machine",
    "neither": "The tail lies in neither content nor noise",
}


def latency_distribution(
    records: pd.DataFrame, statistics: Mapping[str, Any], context: FigureContext, style: Style
) -> Figure:
    """Draw histogram, CDF and percentiles of T_total, T_first_token beside it, and the tail.

    Parameters
    ----------
    records : DataFrame
        Reads `T_total`, `T_first_token` (ms), `tiling_rows`, `tiling_cols`, `num_crops`,
        `num_output_tokens` and `status`.
    statistics : mapping
        `T_total` and, where measured, `T_first_token`: `statistics.Summary`;
        `variance_budget`, optional: `statistics.VarianceBudget`.
    """
    rows = ok_rows(records)
    total = statistics["T_total"]
    with style.applied():
        title = (
            f"{context.model}: half of the requests take {number(ends(total.P50)[0])} ms or "
            f"less, one in a hundred {number(ends(total.P99)[0])} ms or more: P99/P50 = "
            f"{interval(total.tail_ratio)} (n = {total.n:,})"
        )
        figure, axes = panels(
            style,
            context,
            title,
            [["histogram", "cdf", "first"], ["tiling", "length", "variance"]],
        )
        _histogram(axes["histogram"], rows, "T_total", total)
        _cdf(axes["cdf"], rows, statistics)
        _histogram(axes["first"], rows, "T_first_token", statistics.get("T_first_token"))
        threshold = ends(total.P99)[0]
        _by_tiling(axes["tiling"], rows, threshold)
        _by_length(axes["length"], rows, threshold)
        _variance(axes["variance"], statistics.get("variance_budget"))
    return figure


def _finite(rows: pd.DataFrame, name: str) -> NDArray[np.float64]:
    values = column(rows, name)
    return values[np.isfinite(values)]


def _is_wide(values: NDArray[np.float64]) -> bool:
    return bool(values.min() > 0 and values.max() / values.min() > LOG_RATIO)


def _histogram(axes: Axes, rows: pd.DataFrame, name: str, summary: Summary | None) -> None:
    values = _finite(rows, name)
    heading = "Whole request" if name == "T_total" else LABELS[name].capitalize()
    headline(axes, heading)
    if not values.size or summary is None:
        return nothing(axes)
    count = int(np.clip(math.ceil(2 * values.size ** (1 / 3)), 5, 60))
    if _is_wide(values):
        axes.set_xscale("log")
        edges = np.geomspace(values.min(), values.max(), count + 1)
    else:
        edges = np.histogram_bin_edges(values, bins=count)
    axes.hist(values, bins=edges.tolist(), color=COLOURS[name], alpha=0.55)
    notes = []
    for percentile, colour in PERCENTILES.items():
        statistic: Estimate = getattr(summary, percentile)
        value, low, high = ends(statistic)
        axes.axvline(value, color=colour, label=f"{percentile} {interval(statistic)}")
        axes.axvspan(
            values.min() if low is None else low,
            values.max() if high is None else high,
            color=colour,
            alpha=0.18,
            linewidth=0,
        )
        if statistic.note:
            notes.append(statistic.note)
    axes.set(xlabel=f"{name} (ms)", ylabel="requests")
    said = [note.partition(" (found")[0].replace(">=", "≥") for note in dict.fromkeys(notes)]
    needs = [line for note in said for line in textwrap.wrap(note, 40)]
    headroom(axes, 3 + len(needs))
    axes.legend(loc="upper right", title="\n".join(needs) or None, alignment="left")
    return None


def _cdf(axes: Axes, rows: pd.DataFrame, statistics: Mapping[str, Any]) -> None:
    headline(axes, "Cumulative, with intervals")
    drawn = []
    for name in ("T_total", "T_first_token"):
        values, summary = _finite(rows, name), statistics.get(name)
        if not values.size or summary is None:
            continue
        drawn.append(values)
        axes.ecdf(values, color=COLOURS[name], label=f"{name} (n = {values.size:,})")
        for percentile in PERCENTILES:
            axes.errorbar(
                ends(getattr(summary, percentile))[0],
                int(percentile[1:]) / 100 - 0.006 * len(drawn),  # side by side, not on each other
                xerr=whiskers(getattr(summary, percentile)),
                color=COLOURS[name],
                fmt="o",
                capsize=3,
            )
    if not drawn:
        return nothing(axes)
    if _is_wide(np.concatenate(drawn)):
        axes.set_xscale("log")
    axes.set_yticks([0, 0.25, 0.5, 0.75, 0.95, 0.99], ["0", "25", "50", "75", "95", ""])
    axes.set(xlabel="latency (ms)", ylabel="requests at or below (%)", ylim=(0, 1.04))
    axes.legend(loc="upper left")
    return None


def _tail_scatter(
    axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], threshold: float
) -> None:
    """Draw points, those at or above P99 in another colour and shape."""
    tail = y >= threshold
    axes.scatter(x[~tail], y[~tail], color=COLOURS["T_total"], **point_style(int((~tail).sum())))
    axes.scatter(
        x[tail],
        y[tail],
        s=16,
        marker="D",
        color=ALARM,
        linewidths=0,
        zorder=4,
        label="at or above P99",
    )
    if np.isfinite(y).any() and _is_wide(y[np.isfinite(y)]):
        axes.set_yscale("log")
    axes.set_ylabel("T_total (ms)")
    axes.legend(loc="upper left")
    headroom(axes, 1)


def _by_tiling(axes: Axes, rows: pd.DataFrame, threshold: float) -> None:
    headline(axes, "By tiling, with quartiles")
    total, crops = column(rows, "T_total"), column(rows, "num_crops")
    across, down = column(rows, "tiling_cols"), column(rows, "tiling_rows")
    known = np.isfinite(total) & (np.isfinite(crops) | np.isfinite(across))
    if not known.any():
        return nothing(axes, "no tilings recorded")
    groups: dict[tuple[float, float], list[int]] = {}
    for i in np.flatnonzero(known):
        tiles = down[i] * across[i]
        key = (tiles, down[i]) if np.isfinite(tiles) else (crops[i], math.nan)
        groups.setdefault((key[0], key[1] if np.isfinite(key[1]) else -1.0), []).append(int(i))
    order = sorted(groups)
    names = [
        f"{rows_:.0f}×{tiles / rows_:.0f}" if rows_ > 0 else f"{tiles:.0f} crops"
        for tiles, rows_ in order
    ]
    position = np.concatenate([np.full(len(groups[key]), i) for i, key in enumerate(order)])
    index = np.concatenate([groups[key] for key in order])
    _tail_scatter(axes, position + jitter(index.size, 0.5), total[index], threshold)
    axes.boxplot(
        [total[groups[key]] for key in order],
        positions=range(len(order)),
        widths=0.65,
        showfliers=False,
        whis=(0, 100) if index.size <= 2 * len(order) else 1.5,
        medianprops={"color": COLOURS["T_first_token"], "linewidth": 1.8},
        boxprops={"linewidth": 0.8},
        whiskerprops={"linewidth": 0.8},
        capprops={"linewidth": 0.8},
    )
    many = len(order) > 6
    axes.set_xticks(range(len(order)), names, rotation=90 if many else 0)
    axes.set_xlabel("tiling (rows × columns)")
    return None


def _by_length(axes: Axes, rows: pd.DataFrame, threshold: float) -> None:
    headline(axes, "By output length, with medians")
    total, tokens = column(rows, "T_total"), column(rows, "num_output_tokens")
    known = np.isfinite(total) & np.isfinite(tokens)
    if not known.any():
        return nothing(axes, "no output lengths recorded")
    total, tokens = total[known], tokens[known]
    _tail_scatter(axes, tokens + jitter(tokens.size, 0.4), total, threshold)
    medians = pd.Series(total).groupby(tokens).median()
    axes.plot(
        medians.index, medians, marker="_", color=COLOURS["T_first_token"], markersize=9, zorder=3
    )
    if np.unique(tokens).size <= 12:
        axes.set_xticks(np.unique(tokens))
    axes.set_xlabel("output tokens")
    return None


def _variance(axes: Axes, budget: VarianceBudget | None) -> None:
    headline(axes, SOURCES.get(budget.verdict if budget else "", "Where the spread comes from"))
    shares = {k: v for k, v in (budget.shares if budget else {}).items() if v.value is not None}
    if not shares:
        return nothing(axes, textwrap.fill(budget.sentence if budget else "not analysed", 30))
    for i, (name, share) in enumerate(shares.items()):
        value = 100 * ends(share)[0]
        colour = ALARM if name in {"noise", "unexplained"} else COLOURS["T_vision_encoder"]
        error = whiskers(share, 100)
        axes.barh(i, value, xerr=error, color=colour, alpha=0.75, capsize=3)
        axes.annotate(
            interval(share, "%", 100),
            (max(0.0, value + float(error[1, 0])), i),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            size=small(),
        )
    axes.set_yticks(range(len(shares)), list(shares))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="share of the variance of T_total (%)")
    axes.set_xlim(min(0.0, axes.get_xlim()[0]), 160)
    axes.set_xticks(range(0, 101, 25))
    return None
