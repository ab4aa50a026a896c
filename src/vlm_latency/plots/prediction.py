"""predict: latency of a workload that was not run, and what pruning could win."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from vlm_latency.plots.notation import LABELS, ends, interval, number
from vlm_latency.plots.style import (
    COLOURS,
    FigureContext,
    Style,
    column,
    headline,
    headroom,
    nothing,
    panels,
    small,
)

LINES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")


def predicted_latency(
    grid: pd.DataFrame,
    pruning: pd.DataFrame,
    statistics: Mapping[str, Any],
    context: FigureContext,
    style: Style,
) -> Figure:
    """Draw latency over vision and output tokens, its composition, and pruning at its best.

    Parameters
    ----------
    grid : DataFrame
        `num_vision_tokens`, `num_output_tokens`, `latency_ms`: one row per cell; optional,
        `extrapolated`: cells outside of what was measured, which get a cross.
    pruning : DataFrame
        `where` (where tokens are dropped, in words), `keep` (share kept, 0 to 1), `latency_ms`,
        and, optional, `low_ms`, `high_ms`.
    statistics : mapping
        `latency`: estimate (ms) of the workload asked for; `composition`: ms (numbers or
        estimates) by column name; `workload`, `hardware`: in words.
    """
    with style.applied():
        title = (
            f"{context.model} on {statistics['hardware']}, {statistics['workload']}: "
            f"{interval(statistics['latency'], 'ms')} predicted without running it"
        )
        figure, axes = panels(
            style,
            context,
            title,
            [["map", "composition", "pruning"]],
            widths=[1.25, 0.95, 1.1],
            panel=(4.3, 3.6),
        )
        headline(axes["map"], "Predicted latency (ms)")
        _map(axes["map"], grid)
        headline(axes["composition"], "Where the time would go")
        _composition(axes["composition"], statistics["composition"])
        headline(axes["pruning"], "What dropping vision tokens could win at best")
        _pruning(axes["pruning"], pruning)
    return figure


def _map(axes: Axes, grid: pd.DataFrame) -> None:
    if not len(grid):
        return nothing(axes, "not predicted")
    table = grid.pivot_table(
        index="num_vision_tokens", columns="num_output_tokens", values="latency_ms"
    )
    values = table.to_numpy(float)
    crossed = np.zeros(values.shape, dtype=bool)
    if "extrapolated" in grid:
        cells = grid.pivot_table(
            index="num_vision_tokens", columns="num_output_tokens", values="extrapolated"
        )
        crossed = cells.to_numpy(float) > 0
    low, high = np.nanmin(values), np.nanmax(values)
    norm = LogNorm(low, high) if 0 < low < high else None
    axes.imshow(values, origin="lower", aspect="auto", cmap="cividis", norm=norm)
    middle = np.sqrt(low * high) if norm else (low + high) / 2
    for (i, j), value in np.ndenumerate(values):
        axes.text(
            j, i, number(value) + " ×" * int(crossed[i, j]), ha="center", va="center", size=small(),
            color="white" if value <= middle else "black",
        )  # fmt: skip
    axes.set_xticks(range(table.shape[1]), [f"{n:,}" for n in table.columns])
    axes.set_yticks(range(table.shape[0]), [f"{n:,}" for n in table.index])
    axes.set(xlabel="output tokens", ylabel="vision tokens")
    axes.grid(visible=False)
    return None


def _composition(axes: Axes, composition: Mapping[str, Any]) -> None:
    shown = {k: v for k, v in composition.items() if np.isfinite(ends(v)[0])}
    total = sum(ends(value)[0] for value in shown.values())
    if not total > 0:
        return nothing(axes, "not predicted")
    left = 0.0
    for i, (name, value) in enumerate(shown.items()):
        width = ends(value)[0]
        axes.barh(i, width, left=left, color=COLOURS.get(name, "black"))
        left += width
        axes.text(
            1.01, i, f"{number(width)} ms\n{100 * width / total:.1f} %", size=small(),
            transform=axes.get_yaxis_transform(), va="center",
        )  # fmt: skip
    axes.set_yticks(range(len(shown)), [LABELS.get(name, name) for name in shown])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("latency (ms)")
    return None


def _pruning(axes: Axes, pruning: pd.DataFrame) -> None:
    if not len(pruning):
        return nothing(axes, "not predicted")
    for i, (where, unsorted) in enumerate(pruning.groupby("where", sort=False)):
        rows = unsorted.sort_values("keep")
        kept, latency = 100 * column(rows, "keep"), column(rows, "latency_ms")
        colour = LINES[i % len(LINES)]
        axes.plot(kept, latency, marker="o", color=colour, label=str(where))
        axes.fill_between(
            kept, column(rows, "low_ms"), column(rows, "high_ms"), color=colour, alpha=0.15, lw=0
        )
    axes.set_xticks(100 * np.unique(column(pruning, "keep")))
    axes.set(xlabel="vision tokens kept (%)", ylabel="latency (ms)")
    # An interval may be very wide: what it says of its end stands in the title.
    axes.set_ylim(0, min(axes.get_ylim()[1], 3 * float(np.nanmax(column(pruning, "latency_ms")))))
    axes.invert_xaxis()
    headroom(axes, pruning["where"].nunique())
    axes.legend(loc="upper right")
    return None
