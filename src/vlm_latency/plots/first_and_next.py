"""Time to the first token, and per further token, of several models or engines."""

from __future__ import annotations

import math
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from vlm_latency.plots.notation import LABELS, Statistic, ends, interval
from vlm_latency.plots.style import (
    COLOURS,
    LEGEND_BELOW,
    FigureContext,
    ReportFigure,
    Style,
    headline,
    nothing,
    panels,
    small,
    whiskers,
)
from vlm_latency.records import UNTIL_FIRST_TOKEN

BEFORE = "T_preprocess"


def first_and_next(
    results: Mapping[str, Mapping[str, Statistic]], context: FigureContext, style: Style
) -> Figure:
    """Draw the parts of the time to first token, and the time of a decode step, row by row.

    Parameters
    ----------
    results : mapping of name to mapping
        Models or engines; each `T_preprocess`, `T_vision_encoder`, `T_projector`, `T_LLM_prefill`,
        `T_first_token` and `per_token` (estimates, ms). What was not measured is absent or None.
    """
    height = 1.5 + 0.5 * len(results)
    with style.applied():
        figure, axes = panels(
            style, context, context.title, [["first", "next"]], widths=[1.7, 1], panel=(4.2, height),
            reading="Bars: medians; black: 95 % intervals",
        )  # fmt: skip
        for name, panel in axes.items():
            if name == "first":
                headline(panel, "Up to the first token; below it, preprocessing")
                _first(panel, results)
            else:
                headline(panel, "Each further token")
                _next(panel, results)
            panel.set_yticks(range(len(results)), list(results))
            panel.set_ylim(len(results) - 0.4, -0.6)
            panel.tick_params(axis="y", labelleft=name == "first" or len(axes) == 1)
            panel.grid(axis="y", visible=False)
            panel.set_xlim(0, 1.3 * panel.get_xlim()[1])
    return figure


def _first(axes: Axes, results: Mapping[str, Mapping[str, Statistic]]) -> None:
    told: set[str] = set()

    def bar(name: str, row: float, value: float, left: float, height: float) -> None:
        label = "_" if name in told else LABELS[name]
        told.add(name)
        axes.barh(row, value, height, left=left, color=COLOURS[name], label=label)

    for i, parts in enumerate(results.values()):
        start, total = 0.0, ends(parts.get("T_first_token"))[0]
        for name in UNTIL_FIRST_TOKEN:
            value = ends(parts.get(name))[0]
            if value > 0:
                bar(name, i - 0.1, value, start, 0.45)
                start += value
        if total > start:
            bar("T_other", i - 0.1, total - start, start, 0.45)
        if ends(parts.get(BEFORE))[0] > 0:
            bar(BEFORE, i + 0.27, ends(parts[BEFORE])[0], 0.0, 0.22)
        _said(axes, i - 0.1, parts.get("T_first_token"))
    axes.set_xlabel("latency (ms)")
    figure = axes.get_figure(root=True)
    assert figure is not None
    below = ScaledTranslation(0, -LEGEND_BELOW - 0.05, figure.dpi_scale_trans)
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=axes.transAxes + below,
        ncols=3 if isinstance(figure, ReportFigure) and figure.style.paper else 5,
    )  # fmt: skip


def _next(axes: Axes, results: Mapping[str, Mapping[str, Statistic]]) -> None:
    known = {i: parts.get("per_token") for i, parts in enumerate(results.values())}
    if not any(math.isfinite(ends(each)[0]) for each in known.values()):
        return nothing(axes)
    for i, each in known.items():
        if math.isfinite(value := ends(each)[0]):
            axes.barh(i - 0.1, value, 0.45, color=COLOURS["T_LLM_decode"])
            _said(axes, i - 0.1, each)
    axes.set_xlabel("decode step (ms)")
    return None


def _said(axes: Axes, row: float, statistic: Statistic) -> None:
    value, error = ends(statistic)[0], whiskers(statistic)
    if not math.isfinite(value):
        return
    axes.errorbar(value, row, xerr=error, color="black", capsize=3, fmt="none")
    axes.annotate(
        interval(statistic), (value + float(error[1, 0]), row), xytext=(5, 0),
        textcoords="offset points", va="center", size=small(),
    )  # fmt: skip
