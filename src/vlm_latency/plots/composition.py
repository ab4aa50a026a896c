"""exp2: which component holds the parameters, and which takes the time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlm_latency.plots.notation import ends, interval, number
from vlm_latency.plots.style import (
    COLOURS,
    LABELS,
    FigureContext,
    Style,
    column,
    headline,
    jitter,
    nothing,
    ok_rows,
    panels,
    point_style,
    small,
    whiskers,
)
from vlm_latency.records import COMPONENTS

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
        for name in names:
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


def latency_components(
    records: pd.DataFrame, statistics: Mapping[str, Any], context: FigureContext, style: Style
) -> Figure:
    """Draw a pie of the mean latency per component and, since pies hide, bars with intervals.

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
    shares = statistics.get("shares") or {}
    with style.applied():
        title = f"{context.model}: {interval(means.get('T_total'), 'ms')} per request"
        first = max(parts, key=lambda name: ends(means[name])[0], default="")
        if first in shares:
            title += f", {interval(shares[first], '%', 100)} of it in {_called(first)}"
        title += f" (mean of n = {statistics['n']:,})"
        figure, axes = panels(
            style, context, title, [["pie", "bars"]], widths=[1.0, 1.75], panel=(4.2, 3.6)
        )
        headline(axes["pie"], "Mean latency")
        headline(axes["bars"], "Stacked, with 95 % intervals, each run a point")
        if not parts:
            nothing(axes["pie"], "components not separable")
        else:
            _latency_pie(axes["pie"], means, parts)
        _cascade(axes["bars"], rows, means, parts, shares=shares, paper=style.paper)
    return figure


def _called(name: str) -> str:
    return {"T_other": "neither component"}.get(name, f"the {LABELS[name]}")


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


def _cascade(
    axes: Axes,
    rows: pd.DataFrame,
    means: Mapping[str, Any],
    parts: Sequence[str],
    *,
    shares: Mapping[str, Any],
    paper: bool,
) -> None:
    """Draw one stacked bar, and below it each of its pieces on a row of its own."""
    total = ends(means.get("T_total"))[0]
    names = ["T_total", *parts]
    start, reach = 0.0, total if math.isfinite(total) else 0.0
    starts = []
    for name in parts:
        value = ends(means[name])[0]
        axes.barh(0, value, left=start, color=COLOURS[name], edgecolor="white", linewidth=0.5)
        starts.append(start)
        start += value
    if not parts and math.isfinite(total):
        axes.barh(0, total, color=COLOURS["T_total"], alpha=0.6)
    if "T_total" in means:
        axes.errorbar(
            total, 0, xerr=whiskers(means["T_total"]), color="black", capsize=3, fmt="none"
        )
        reach = max(reach, total + float(whiskers(means["T_total"])[1, 0]))
    for i, (name, left) in enumerate(zip(parts, starts, strict=True), start=1):
        _one_bar(axes, (left, i), means[name], name, rows)
        reach = max(
            reach, left + max(0.0, ends(means[name])[0]) + float(whiskers(means[name])[1, 0])
        )
    if "T_preprocess" in means:
        names.append("T_preprocess")
        _one_bar(axes, (0.0, len(names) - 0.6), means["T_preprocess"], "T_preprocess", rows)
        axes.axhline(len(names) - 1.3, color="#bbbbbb", linewidth=0.8, linestyle=":")
        reach = max(reach, ends(means["T_preprocess"])[0])
    positions = [i + (0.4 if name == "T_preprocess" else 0) for i, name in enumerate(names)]
    labels = [
        "whole request"
        if name == "T_total"
        else "before it:\npreprocessing"
        if name == "T_preprocess"
        else LABELS[name]
        for name in names
    ]
    for y, name in zip(positions, names, strict=True):
        if name not in means:
            continue
        text = interval(means[name], "ms")
        if name in shares and name in parts and not paper:
            text += f"\n{interval(shares[name], '%', 100)}"
        axes.text(
            1.01,
            y,
            text,
            transform=axes.get_yaxis_transform(),
            va="center",
            ha="left",
            size=small(),
        )
    axes.set_yticks(positions, labels)
    axes.set_ylim(positions[-1] + 0.6, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("latency (ms)")
    axes.set_xlim(min(0.0, *starts, start) * 1.05 if starts else 0.0, (reach or 1.0) * 1.05)


def _one_bar(axes: Axes, at: tuple[float, float], mean: Any, name: str, rows: pd.DataFrame) -> None:
    left, y = at
    value = ends(mean)[0]
    axes.barh(y, value, left=left, color=COLOURS[name], alpha=0.85)
    raw = column(rows, name)
    raw = raw[np.isfinite(raw)]
    axes.scatter(
        left + raw, y + jitter(raw.size, 0.5), color="black", **{**point_style(raw.size), "s": 4}
    )
    axes.errorbar(
        left + value, y, xerr=whiskers(mean), color="black", capsize=3, fmt="none", zorder=4
    )


def _count(value: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{number(value / size)} {unit}"
    return number(value)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.0005 or share == 0 else "< 0.1 %"
