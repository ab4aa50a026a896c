"""exp3: latency against the number of vision tokens, encoder and decoder told apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vlm_latency.plots.notation import interval
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
)

if TYPE_CHECKING:
    from vlm_latency.statistics import BandedFit

PANELS = {
    "total": ("Whole request", ("T_total",)),
    "prefill": ("LLM prefill", ("T_LLM_prefill",)),
    "components": ("Components", ("T_vision_encoder", "T_projector", "T_LLM_prefill")),
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
        `fits`: `statistics.BandedFit` by column name, ms per unit of the axis;
        `encoder_per_crop` and `prefill_per_token`, optional: estimates (ms) of the fit that tells
        crops from tokens; `exponent`, optional: estimate of the power law of T_total.
    """
    rows = ok_rows(records)
    unit = "patch" if style.vision_axis == "patches" else "token"
    x = column(rows, f"num_vision_{style.vision_axis}")
    fits = statistics["fits"]
    said = []
    if "T_total" in fits:
        slope = interval(fits["T_total"].slope, "µs", 1000)
        said.append(f"each vision {unit} costs {slope} of T_total")
    crops, tokens = (statistics.get(k) for k in ("encoder_per_crop", "prefill_per_token"))
    if crops is not None and tokens is not None:
        said.append(
            f"told apart, a crop costs the encoder {interval(crops, 'ms')} and a token the "
            f"prefill {interval(tokens, 'µs', 1000)}"
        )
    if statistics.get("exponent") is not None:
        said.append(f"exponent {interval(statistics['exponent'])}")
    title = f"{context.model}: {'; '.join(said) or f'latency against vision {unit}s'}"
    with style.applied():
        figure, axes = panels(style, context, title, [list(PANELS)])
        for name, (heading, columns) in PANELS.items():
            headline(axes[name], f"{heading} against vision {style.vision_axis}")
            _panel(axes[name], rows, x, columns, fits=fits, unit=unit)
            axes[name].set_xlabel(
                "vision tokens in the prompt" if unit == "token" else "vision patches (crops × 576)"
            )
    return figure


def _panel(
    axes: Axes,
    rows: pd.DataFrame,
    x: NDArray[np.float64],
    columns: tuple[str, ...],
    *,
    fits: Mapping[str, BandedFit],
    unit: str,
) -> None:
    paired = rows["pair"].notna().to_numpy() if "pair" in rows else np.zeros(len(rows), bool)
    drawn = False
    for name in columns:
        y = column(rows, name)
        known = np.isfinite(x) & np.isfinite(y)
        if not known.any():
            continue
        drawn = True
        colour = COLOURS[name]
        plain = known & ~paired
        axes.scatter(x[plain], y[plain], color=colour, **point_style(int(known.sum())))
        _pairs(axes, rows[known & paired], x[known & paired], y[known & paired], colour)
        fit = fits.get(name)
        label = LABELS[name]
        if fit:
            label += f": {interval(fit.slope, '', 1000)} µs per {unit}"
        axes.plot([], [], color=colour, label=label)
        draw_fit(axes, fit, colour, "_fit")
    if not drawn:
        return nothing(axes)
    if paired.any():
        axes.plot(
            [], [], color="#555555", marker="D", mfc="white", ls=":", label="same number of crops"
        )
    axes.set_ylabel("latency (ms)")
    lowest = min(float(np.nanmin(column(rows, name), initial=0.0)) for name in columns)
    axes.set_ylim(bottom=lowest)
    headroom(axes, len(columns) + bool(paired.any()))
    axes.legend(loc="upper left")
    return None


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
