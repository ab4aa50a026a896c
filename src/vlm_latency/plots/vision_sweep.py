"""exp3: latency against the number of vision tokens, encoder and decoder told apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vlm_latency.plots.notation import LABELS, ends, interval, number
from vlm_latency.plots.style import (
    COLOURS,
    SERIES,
    FigureContext,
    Style,
    column,
    draw_fit,
    headline,
    legend,
    nothing,
    panels,
    point_style,
)
from vlm_latency.records import UNTIL_FIRST_TOKEN, ok_rows

if TYPE_CHECKING:
    from vlm_latency.statistics import BandedFit, FloorAndLine

PANELS = {
    "total": ("Whole request", ("T_total",)),
    "prefill": ("LLM prefill", ("T_LLM_prefill",)),
    "components": ("Components", UNTIL_FIRST_TOKEN),
}


def vision_tokens_vs_latency(
    records: pd.DataFrame, statistics: Mapping[str, Any], context: FigureContext, style: Style
) -> Figure:
    """Draw total, prefill and components against vision tokens, every run a point.

    Grids of the same number of crops but different tokens (`pair`) are open diamonds joined by a
    dotted line: between them the encoder does the same work, the decoder more.

    Parameters
    ----------
    records : DataFrame
        Reads `num_vision_tokens` or, with `style.vision_axis == "patches"`,
        `num_vision_patches`; `num_crops`, `pair`, `T_total`, `T_LLM_prefill`, `T_vision_encoder`,
        `T_projector` (ms) and `status`.
    statistics : mapping
        `fits`: `statistics.BandedFit` by column name, ms per unit of the axis; `floors`, optional:
        `statistics.FloorAndLine` by column name, drawn instead of the line where one holds.
    """
    rows = ok_rows(records)
    unit = "patch" if style.vision_axis == "patches" else "token"
    x = column(rows, f"num_vision_{style.vision_axis}")
    with style.applied():
        figure, axes = panels(
            style,
            context,
            context.title,
            [list(PANELS)],
            reading=(
                f"Points: {len(rows):,} runs of {rows['request_id'].nunique()} images; lines with "
                "95 % bands, floors without; open diamonds: images that are cut into equally many crops but give "
                "different numbers of tokens, a dotted line joining their medians"
            ),
        )
        for name, panel in axes.items():
            heading, columns = PANELS[name]
            headline(panel, f"{heading} against vision {style.vision_axis} (n = {len(rows):,})")
            _panel(panel, rows, x, columns, statistics=statistics, unit=unit)
            panel.set_xlabel(
                "vision tokens in the prompt" if unit == "token" else "vision patches (crops × 576)"
            )
    return figure


def overlaid(
    results: Mapping[str, tuple[pd.DataFrame, BandedFit | FloorAndLine | None]],
    name: str,
    context: FigureContext,
    style: Style,
    axis: str = "num_vision_tokens",
) -> Figure:
    """Draw one column of several results against a number of tokens in one panel.

    Parameters
    ----------
    results : mapping of name to (records, line, or floor and line)
        Models, devices or engines.
    name : str
        The column: `T_total`, `T_LLM_prefill`, …
    axis : str
        The column of the axis: `num_vision_tokens`, `num_vision_patches`, `num_output_tokens`.
    """
    counted = axis.removeprefix("num_").replace("_", " ")
    with style.applied():
        figure, axes = panels(
            style, context, context.title, [["overlaid"]], panel=(5.6, 3.8),
            reading="Points: runs; lines with 95 % bands",
        )  # fmt: skip
        for panel in axes.values():
            headline(panel, f"{_sentence(LABELS[name])} against {counted}")
            lowest = 0.0
            for i, (label, (records, fit)) in enumerate(results.items()):
                rows = ok_rows(records)
                x, y = column(rows, axis), column(rows, name)
                known = np.isfinite(x) & np.isfinite(y)
                lowest = min([lowest, *y[known]])
                colour, marker = SERIES[i % len(SERIES)], "os^Dv<>P"[i % 8]
                dots = point_style(int(known.sum()))
                # What has no line is drawn over what has one: else it might not be seen at all.
                over, line = (4, "none") if fit is None else (1, "-")
                panel.scatter(x[known], y[known], color=colour, marker=marker, zorder=over, **dots)
                text = f"{label} (n = {known.sum()}){_cost(fit, counted)}"
                panel.plot([], [], color=colour, marker=marker, ls=line, label=text)
                if fit is not None and hasattr(fit, "predict"):
                    at = np.linspace(x[known].min(), x[known].max(), 200)
                    panel.plot(at, fit.predict(at), color=colour, zorder=3)
                else:
                    draw_fit(panel, fit, colour, "_fit")
            panel.set(xlabel=counted, ylabel="latency (ms)")
            panel.set_ylim(bottom=lowest)
            legend(panel)
    return figure


def _sentence(label: str) -> str:
    return label[:1].upper() + label[1:]


def _cost(fit: BandedFit | FloorAndLine | None, counted: str) -> str:
    """Say what one more costs; beyond the floor, where there is one."""
    if fit is None:
        return ""
    unit = "patch" if counted.endswith("patches") else "token"
    small = abs(ends(fit.slope)[0]) < 1
    shown = interval(fit.slope, "µs", 1000) if small else interval(fit.slope, "ms")
    cost = f": {shown} per {unit}"
    free = getattr(fit, "free", None)
    return cost + (f"\nbeyond {interval(free)}, none before" if free else "")


def _panel(
    axes: Axes,
    rows: pd.DataFrame,
    x: NDArray[np.float64],
    columns: tuple[str, ...],
    *,
    statistics: Mapping[str, Any],
    unit: str,
) -> None:
    paired = rows["pair"].notna().to_numpy() if "pair" in rows else np.zeros(len(rows), bool)
    drawn = []
    for name in columns:
        y = column(rows, name)
        known = np.isfinite(x) & np.isfinite(y)
        if not known.any():
            continue
        drawn.append(y[known])
        colour = COLOURS[name]
        plain = known & ~paired
        axes.scatter(x[plain], y[plain], color=colour, **point_style(int(known.sum())))
        _pairs(axes, rows[known & paired], x[known & paired], y[known & paired], colour)
        fit, floor = statistics["fits"].get(name), (statistics.get("floors") or {}).get(name)
        label = LABELS[name]
        if floor and floor.holds == "floor and line":
            at = np.linspace(x[known].min(), x[known].max(), 200)
            axes.plot(at, floor.predict(at), color=colour, zorder=3)
            label += (
                f": {interval(floor.floor, 'ms')} up to {number(floor.free.value)} {unit}s,\n"
                f"then {interval(floor.slope, '', 1000)} µs each"
            )
        elif fit:
            label += f": {interval(fit.slope, '', 1000)} µs per {unit}"
            draw_fit(axes, fit, colour, "_fit")
        axes.plot([], [], color=colour, label=label)
    if not drawn:
        return nothing(axes)
    if paired.any():
        axes.plot(
            [], [], color="#555555", marker="D", mfc="white", ls=":",
            label="equal crops, different tokens (medians joined)",
        )  # fmt: skip
    axes.set_ylabel("latency (ms)")
    axes.set_ylim(bottom=min(0.0, *(float(y.min()) for y in drawn)))
    return legend(axes)


def _pairs(
    axes: Axes,
    rows: pd.DataFrame,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    colour: str,
) -> None:
    axes.scatter(x, y, marker="D", s=16, facecolors="none", edgecolors=colour, linewidths=0.7)
    table = pd.DataFrame({"pair": rows["pair"].to_numpy(), "x": x, "y": y})
    for _, group in table.groupby("pair"):
        medians = group.groupby("x")["y"].median()
        axes.plot(medians.index, medians, color=colour, linestyle=":", linewidth=1.2, zorder=2)
