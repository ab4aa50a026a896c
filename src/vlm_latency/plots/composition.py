"""exp2: which component holds the parameters, and which takes the time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlm_latency.plots.notation import LABELS, ends, interval, number
from vlm_latency.plots.style import (
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
    small,
    whiskers,
)
from vlm_latency.records import COMPONENTS, ok_rows

PARTS = {
    "params_vision_encoder": ("vision encoder", COLOURS["T_vision_encoder"]),
    "params_projector": ("projector", COLOURS["T_projector"]),
    "params_llm": ("LLM", COLOURS["T_LLM_prefill"]),
}


def parameters_pie(parameters: Mapping[str, Any], context: FigureContext, style: Style) -> Figure:
    """Draw the parameters per component; for a mixture of experts also the active ones.

    Parameters
    ----------
    parameters : mapping
        Reads `params_vision_encoder`, `params_projector`, `params_llm`, `params_total`, and for a
        mixture of experts `params_llm_active`, `params_active`, `moe_num_experts`, `moe_top_k`.
    """
    total, llm = parameters["params_total"], parameters["params_llm"]
    experts = parameters.get("moe_num_experts")
    with style.applied():
        title = f"{context.model}: the LLM holds {100 * llm / max(total, 1):.1f} % of "
        title += f"{_count(total)} parameters"
        if experts:
            title += f", and {_count(parameters['params_active'])} are active per token"
        names = ["total", "active"] if experts else ["total"]
        figure, axes = panels(style, context, title, [names], panel=(5.2, 3.0))
        for name in axes:
            values = {key: parameters[key] or 0 for key in PARTS}
            heading = "Parameters"
            if name == "active":
                values["params_llm"] = parameters["params_llm_active"]
                heading = f"Active ({parameters['moe_top_k']} of {experts} experts)"
            elif experts:
                heading = "All parameters"
            headline(axes[name], heading)
            whole = sum(values.values())
            _donut(
                axes[name],
                list(values.values()),
                [colour for _, colour in PARTS.values()],
                [
                    f"{PARTS[key][0]}  {_count(value)}  ({_percent(value / max(whole, 1))})"
                    for key, value in values.items()
                ],
                _count(whole),
            )
    return figure


def latency_pie(statistics: Mapping[str, Any], context: FigureContext, style: Style) -> Figure:
    """Draw the mean latency per component as a pie; `latency_components` has the intervals.

    Parameters
    ----------
    statistics : mapping
        `means` and `n`, as in `latency_components`.
    """
    means = {key: value for key, value in statistics["means"].items() if value is not None}
    parts = [name for name in COMPONENTS if math.isfinite(ends(means.get(name))[0])]
    with style.applied():
        figure, axes = panels(style, context, context.title, [["pie"]], panel=(5.2, 3.4))
        for panel in axes.values():
            headline(panel, f"Mean latency of n = {statistics['n']:,} requests")
            if parts:
                _latency_pie(panel, means, parts)
            else:
                nothing(panel, "components not separable")
    return figure


def latency_components(
    records: pd.DataFrame, statistics: Mapping[str, Any], context: FigureContext, style: Style
) -> Figure:
    """Draw the mean latency per component, stacked and one by one, with intervals and runs.

    Parameters
    ----------
    records : DataFrame
        Reads the component columns, `T_total`, `T_preprocess` (ms) and `status`; its runs are the
        points behind the bars.
    statistics : mapping
        `means`: estimates (ms) by column name (`T_vision_encoder`, `T_projector`,
        `T_LLM_prefill`, `T_LLM_decode`, `T_other`, `T_total`, `T_preprocess`; what was not
        measured is absent or None); `shares`, optional: estimates of the share in T_total,
        between 0 and 1, by the same names; `n`: number of requests.
    """
    rows = ok_rows(records)
    means = {key: value for key, value in statistics["means"].items() if value is not None}
    parts = [name for name in COMPONENTS if math.isfinite(ends(means.get(name))[0])]
    with style.applied():
        figure, axes = panels(
            style,
            context,
            context.title,
            [["bars"]],
            panel=(8.4, 3.6),
            reading="Bars: means with 95 % intervals; points: runs",
        )
        for panel in axes.values():
            headline(panel, f"Mean of n = {statistics['n']:,}, 95 % intervals, each run a point")
            _bars(panel, rows, means, parts, {} if style.paper else statistics.get("shares") or {})
    return figure


def stacks(
    results: Mapping[str, Mapping[str, Any]], context: FigureContext, style: Style
) -> Figure:
    """Draw the components of several results side by side.

    Parameters
    ----------
    results : mapping of name to mapping
        Models, devices or engines; each the means (estimates, ms) by column name.
    """
    words = max((len(word) for name in results for word in name.split()), default=0)
    per_bar = max(0.9, 0.1 * words)  # inches, so that names do not run into one another
    with style.applied():
        figure, axes = panels(
            style,
            context,
            context.title,
            [["stacks"]],
            panel=(max(4.0, 1.5 + per_bar * len(results)), 3.6),
            reading="Bars: mean latency per component; black: 95 % interval of the total",
        )
        for panel in axes.values():
            headline(panel, "Mean latency per component")
            told: set[str] = set()
            for i, means in enumerate(results.values()):
                bottom = 0.0
                for name in COMPONENTS:
                    value = ends(means.get(name))[0]
                    if value > 0:
                        label = "_" if name in told else LABELS[name]
                        told.add(name)
                        panel.bar(i, value, 0.7, bottom=bottom, color=COLOURS[name], label=label)
                        bottom += value
                total = ends(means.get("T_total"))[0]
                if not bottom and total > 0:
                    panel.bar(i, total, 0.7, color=COLOURS["T_total"], alpha=0.6)
                panel.errorbar(
                    i, total, yerr=whiskers(means.get("T_total")), color="black", capsize=3
                )
                panel.annotate(
                    interval(means.get("T_total"), "ms").replace(" [", "\n["),
                    (i, total + float(whiskers(means.get("T_total"))[1, 0])),
                    xytext=(0, 3), textcoords="offset points", ha="center", size=small(),
                )  # fmt: skip
            panel.set_xticks(range(len(results)), [name.replace(" ", "\n") for name in results])
            panel.grid(axis="x", visible=False)
            panel.set_ylabel("mean latency (ms)")
            panel.margins(y=0.15)
            legend(panel, reverse=True)
    return figure


def _latency_pie(axes: Axes, means: Mapping[str, Any], parts: Sequence[str]) -> None:
    values = [ends(means[name])[0] for name in parts]
    whole = sum(max(value, 0.0) for value in values)
    labels = [
        f"{LABELS[name]}  {number(value)} ms  "
        + (f"({_percent(value / whole)})" if value >= 0 < whole else "(below zero: not in the pie)")
        for name, value in zip(parts, values, strict=True)
    ]
    _donut(
        axes,
        [max(value, 0.0) for value in values],
        [COLOURS[name] for name in parts],
        labels,
        f"{number(whole)} ms",
    )


def _donut(
    axes: Axes, values: Sequence[float], colours: Sequence[str], labels: Sequence[str], centre: str
) -> None:
    if sum(values) <= 0:
        return nothing(axes)
    wedges, *_ = axes.pie(
        values,
        colors=list(colours),
        startangle=90,
        counterclock=False,
        wedgeprops={"width": 0.42, "edgecolor": "white", "linewidth": 0.8},
    )
    axes.text(0, 0, centre, ha="center", va="center", weight="bold")
    axes.legend(wedges, labels, loc="upper center", bbox_to_anchor=(0.5, 0.02), alignment="left")
    return None


def _bars(
    axes: Axes,
    rows: pd.DataFrame,
    means: Mapping[str, Any],
    parts: Sequence[str],
    shares: Mapping[str, Any],
) -> None:
    """Draw one stacked bar, and below it each of its pieces from zero, on a row of its own."""
    total, start = ends(means.get("T_total"))[0], 0.0
    for name in parts:
        value = ends(means[name])[0]
        axes.barh(0, value, left=start, color=COLOURS[name], edgecolor="white", linewidth=0.5)
        start += value
    if not parts and math.isfinite(total):
        axes.barh(0, total, color=COLOURS["T_total"], alpha=0.6)
    if "T_total" in means:
        axes.errorbar(
            total, 0, xerr=whiskers(means["T_total"]), color="black", capsize=3, fmt="none"
        )
    labels = {"T_total": "whole request", "T_preprocess": "before it:\npreprocessing"}
    names = ["T_total", *parts, *(["T_preprocess"] if "T_preprocess" in means else [])]
    positions = [i + (0.4 if name == "T_preprocess" else 0) for i, name in enumerate(names)]
    for y, name in zip(positions, names, strict=True):
        if name != "T_total":
            _one_bar(axes, y, means[name], name, rows)
        text = interval(means.get(name), "ms")
        if name in shares and name in parts:
            text += f"\n{interval(shares[name], '%', 100)}"
        axes.text(
            1.01, y, text, transform=axes.get_yaxis_transform(), va="center", ha="left",
            size=small(),
        )  # fmt: skip
    if "T_preprocess" in means:
        axes.axhline(positions[-1] - 0.7, color="#bbbbbb", linewidth=0.8, linestyle=":")
    axes.set_yticks(positions, [labels.get(name, LABELS[name]) for name in names])
    axes.set_ylim(positions[-1] + 0.6, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("latency (ms)")
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))


def _one_bar(axes: Axes, y: float, mean: Any, name: str, rows: pd.DataFrame) -> None:
    value = ends(mean)[0]
    axes.barh(y, value, color=COLOURS[name], alpha=0.85)
    raw = column(rows, name)
    raw = raw[np.isfinite(raw)]
    axes.scatter(raw, y + jitter(raw.size, 0.5), color="black", **{**point_style(raw.size), "s": 4})
    axes.errorbar(value, y, xerr=whiskers(mean), color="black", capsize=3, fmt="none", zorder=4)


def _count(value: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{number(value / size)} {unit}"
    return number(value)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.0005 or share == 0 else "< 0.1 %"
