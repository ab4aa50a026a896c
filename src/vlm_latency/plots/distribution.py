"""exp1: how latency is distributed over requests, and where its tail comes from."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from vlm_latency.plots.notation import LABELS, ends, interval
from vlm_latency.plots.style import (
    ALARM,
    COLOURS,
    FigureContext,
    Style,
    column,
    headline,
    jitter,
    legend,
    nothing,
    panels,
    point_style,
    readable_log,
    small,
    whiskers,
)
from vlm_latency.records import ok_rows

if TYPE_CHECKING:
    from vlm_latency.statistics import Estimate, Summary, VarianceBudget

PERCENTILES = {"P50": "#009E73", "P95": "#E69F00", "P99": "#D55E00"}
FEWEST = 5  # values of which quartiles or a median say something
_READ = (
    *("T_total", "T_first_token", "tiling_rows", "tiling_cols", "num_crops"),
    *("num_output_tokens", "outlier_cause", "status"),
)
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
        Reads the columns `_READ`, times in ms.
    statistics : mapping
        `T_total` and, where measured, `T_first_token`: `statistics.Summary`;
        `variance_budget`, optional: `statistics.VarianceBudget`.
    """
    rows = ok_rows(records[[name for name in _READ if name in records]])
    total = statistics["T_total"]
    with style.applied():
        figure, axes = panels(
            style,
            context,
            context.title,
            [["histogram", "cdf", "first"], ["tiling", "length", "variance"]],
            reading=(
                "Lines and bands: percentiles with 95 % intervals; dotted, or an arrow, where so "
                "few requests do not bound the interval"
            ),
        )
        threshold = ends(total.P99)[0]
        draw: dict[str, Callable[[Axes], None]] = {
            "histogram": lambda it: _histogram(it, rows, "T_total", total),
            "cdf": lambda it: _cdf(it, rows, statistics),
            "first": lambda it: _histogram(
                it, rows, "T_first_token", statistics.get("T_first_token")
            ),
            "tiling": lambda it: _by_tiling(it, rows, threshold),
            "length": lambda it: _by_length(it, rows, threshold),
            "variance": lambda it: _variance(it, statistics.get("variance_budget")),
        }
        for name, panel in axes.items():
            draw[name](panel)
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
    if axes.get_xscale() == "log":
        readable_log(axes.xaxis)
    notes = []
    for percentile, colour in PERCENTILES.items():
        statistic: Estimate = getattr(summary, percentile)
        value, low, high = ends(statistic)
        bounded = low is not None and high is not None
        label = f"{percentile} {interval(statistic)}"
        axes.axvline(value, color=colour, label=label, linestyle="-" if bounded else ":")
        if low is not None and high is not None:  # a band that ends where the data do would lie
            axes.axvspan(low, high, color=colour, alpha=0.18, linewidth=0)
        if statistic.note:
            notes.append(statistic.note)
    axes.set(xlabel=f"{name} (ms)", ylabel="requests")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    said = [note.partition(" (found")[0].replace(">=", "≥") for note in dict.fromkeys(notes)]
    needs = [line for note in said for line in textwrap.wrap(note, 40)]
    return legend(axes, "upper right", title="\n".join(needs) or None)


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
            statistic = getattr(summary, percentile)
            value, low, high = ends(statistic)
            axes.errorbar(
                value,
                int(percentile[1:]) / 100 - 0.006 * len(drawn),  # side by side, not on each other
                xerr=whiskers(statistic),
                color=COLOURS[name],
                fmt=">" if high is None else "<" if low is None else "o",
                markersize=6 if None in (low, high) else None,
                capsize=3,
            )
    if not drawn:
        return nothing(axes)
    if _is_wide(np.concatenate(drawn)):
        axes.set_xscale("log")
        readable_log(axes.xaxis)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 0.95, 0.99], ["0", "25", "50", "75", "95", ""])
    axes.set(xlabel="latency (ms)", ylabel="share of requests (%)", ylim=(0, 1.04))
    return legend(axes)


def _tail_scatter(axes: Axes, x: NDArray[np.float64], rows: pd.DataFrame, threshold: float) -> None:
    """Draw points, those at or above P99 in another colour, in a shape for each likely cause."""
    y = column(rows, "T_total")
    tail = y >= threshold
    axes.scatter(x[~tail], y[~tail], color=COLOURS["T_total"], **point_style(int((~tail).sum())))
    causes = pd.Series(["at or above P99"] * len(rows))
    if "outlier_cause" in rows:
        known = rows["outlier_cause"].reset_index(drop=True)
        causes = causes.where(known.isna(), "at or above P99: " + known.astype("string"))
    for cause, marker in zip(causes[tail].unique(), "DsPXv^", strict=False):
        chosen = tail & (causes == cause).to_numpy()
        axes.scatter(
            x[chosen], y[chosen], s=16, marker=marker, color=ALARM, linewidths=0, zorder=4,
            label=cause,
        )  # fmt: skip
    if np.isfinite(y).any() and _is_wide(y[np.isfinite(y)]):
        axes.set_yscale("log")
        readable_log(axes.yaxis)
    axes.set_ylabel("T_total (ms)")
    legend(axes)


def _by_tiling(axes: Axes, rows: pd.DataFrame, threshold: float) -> None:
    headline(axes, f"By tiling, with quartiles from n = {FEWEST}")
    total, crops = column(rows, "T_total"), column(rows, "num_crops")
    across, down = column(rows, "tiling_cols"), column(rows, "tiling_rows")
    known = np.isfinite(total) & (np.isfinite(crops) | np.isfinite(across))
    if not known.any():
        return nothing(axes, "no tilings recorded")
    tiles = down * across
    tiled = np.isfinite(tiles)
    keys = np.column_stack([np.where(tiled, tiles, crops), np.where(tiled, down, -1.0)])
    order, which = np.unique(keys[known], axis=0, return_inverse=True)
    groups = [np.flatnonzero(known)[which == i] for i in range(len(order))]
    names = [
        f"{rows_:.0f}×{tiles / rows_:.0f}"
        if rows_ > 0
        else f"{tiles:.0f} crop{'s' if tiles != 1 else ''}"
        for tiles, rows_ in order
    ]
    position, index = np.sort(which), np.concatenate(groups)
    large = [i for i, group in enumerate(groups) if len(group) >= FEWEST]
    if large:
        thin = {"linewidth": 0.8}
        axes.boxplot(
            [total[groups[i]] for i in large],
            positions=large,
            widths=0.65,
            showfliers=False,
            medianprops={"color": COLOURS["T_first_token"], "linewidth": 1.8},
            boxprops=thin,
            whiskerprops=thin,
            capprops=thin,
        )
    many = len(order) > 6
    names = [f"{name}\nn = {len(group)}" for name, group in zip(names, groups, strict=True)]
    axes.set_xticks(range(len(order)), names, rotation=90 if many else 0)
    axes.set_xlim(-0.6, len(order) - 0.4)
    spread = jitter(index.size, 0.5)
    _tail_scatter(axes, position + spread, rows.iloc[index], threshold)
    axes.set_xlabel("tiling (rows × columns)")
    return None


def _by_length(axes: Axes, rows: pd.DataFrame, threshold: float) -> None:
    headline(axes, f"By output length, with medians from n = {FEWEST}")
    total, tokens = column(rows, "T_total"), column(rows, "num_output_tokens")
    known = np.isfinite(total) & np.isfinite(tokens)
    if not known.any():
        return nothing(axes, "no output lengths recorded")
    total, tokens = total[known], tokens[known]
    _tail_scatter(axes, tokens + jitter(tokens.size, 0.4), rows[known], threshold)
    groups = pd.Series(total).groupby(tokens).agg(["median", "size"])
    medians = groups.loc[groups["size"] >= FEWEST, "median"]
    axes.hlines(
        medians, medians.index - 0.35, medians.index + 0.35, color=COLOURS["T_first_token"],
        linewidth=2, zorder=3,
    )  # fmt: skip
    if np.unique(tokens).size <= 12:
        axes.set_xticks(np.unique(tokens))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
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
    low, high = axes.get_xlim()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlim(low, high + 0.75 * (high - low))  # the numbers stand right of the bars
    axes.set_xticks(np.arange(50 * math.floor(low / 50), max(high, 100) + 1, 50))
    axes.set_xlim(min(low, 0), None)
    return None
