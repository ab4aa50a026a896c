"""What bounds each component: how long the device computes in it, and how close it comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlm_latency.plots.notation import LABELS, number
from vlm_latency.plots.style import (
    COLOURS,
    MUTED,
    FigureContext,
    Style,
    headline,
    legend,
    panels,
    small,
)

IDLE = "#dddddd"
CEILINGS = {"flops": ("FLOP/s", "#0072B2"), "bytes": ("bytes/s", "#E69F00")}
MARKERS = "osD^vP"


def explanation(
    results: Sequence[Mapping[str, Any]],
    statistics: Mapping[str, Any],
    context: FigureContext,
    style: Style,
) -> Figure:
    """Draw busy and idle time per component, idle shares of every shape, and shares of ceilings.

    Parameters
    ----------
    results : sequence of mapping
        One per shape, the first of them in full: `num_vision_tokens`, `num_output_tokens` and
        `components`, by column name with `wall` (estimate), `busy`, `idle` (milliseconds),
        `idle_share`, `bound` (a word or None), `kernels`, `flops_share_of_ceiling` and
        `bytes_share_of_ceiling`.
    statistics : mapping
        `finding`, the title; `work`, what is counted: "kernels" or "operators".
    """
    first = results[0]
    parts = first["components"]
    with style.applied():
        title = f"{context.model}: {statistics['finding']}"
        figure, axes = panels(
            style, context, title, [["time", "idle", "ceilings"]], widths=[1.25, 1, 1]
        )
        shape = f"{first['num_vision_tokens']} vision tokens, {first['num_output_tokens']} output"
        headline(axes["time"], f"Busy and idle ({shape})")
        _time(axes["time"], parts, statistics["work"])
        headline(axes["idle"], "Idle share, without a profiler")
        _idle(axes["idle"], results)
        headline(axes["ceilings"], "Share of the measured ceilings")
        _ceilings(axes["ceilings"], parts)
    return figure


def _rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [LABELS[name] for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def _time(axes: Axes, parts: Mapping[str, Mapping[str, Any]], work: str) -> None:
    names = list(parts)
    for i, name in enumerate(names):
        about = parts[name]
        axes.barh(i, about["busy"], 0.6, color=COLOURS[name])
        # A profiled run slower than the others leaves nothing: no bar, and the table says by how much.
        idle = max(0.0, about["idle"])
        axes.barh(i, idle, 0.6, left=about["busy"], color=IDLE, hatch="////", edgecolor="white")
        axes.annotate(
            f"{about['bound'] or 'no FLOPs'}, {about['kernels']} {work}",
            (about["busy"] + idle, i), xytext=(3, 0), textcoords="offset points",
            va="center", size=small(), color="black" if about["bound"] else MUTED,
        )  # fmt: skip
    axes.bar(0, 0, color=MUTED, label="the device computes")
    axes.bar(0, 0, color=IDLE, hatch="////", edgecolor="white", label="it waits")
    _rows(axes, names)
    axes.set_xlabel("ms")
    axes.set_xlim(0, 1.75 * max(about["busy"] + max(0, about["idle"]) for about in parts.values()))
    legend(axes)


def _idle(axes: Axes, results: Sequence[Mapping[str, Any]]) -> None:
    names = list(results[0]["components"])
    for n, result in enumerate(results):
        shares = [result["components"][name]["idle_share"] for name in names]
        offset = (n - (len(results) - 1) / 2) * 0.12
        axes.plot(
            [np.nan if share is None else 100 * share for share in shares],
            np.arange(len(names)) + offset,
            MARKERS[n % len(MARKERS)],
            color="black",
            fillstyle="full" if n == 0 else "none",
            label=f"{result['num_vision_tokens']} vision tokens",
        )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axvline(100 / 3, color=MUTED, linestyle="--", linewidth=0.8)
    _rows(axes, names)
    axes.set_xlabel("idle (%); from the dashed line on: launches")
    legend(axes)


def _ceilings(axes: Axes, parts: Mapping[str, Mapping[str, Any]]) -> None:
    names = [name for name in parts if parts[name].get("flops_share_of_ceiling") is not None]
    for j, (kind, (label, colour)) in enumerate(CEILINGS.items()):
        shares = [100 * (parts[name][f"{kind}_share_of_ceiling"] or 0) for name in names]
        at = np.arange(len(names)) + (j - 0.5) * 0.36
        axes.barh(at, shares, 0.34, color=colour, label=label)
        for y, share in zip(at, shares, strict=True):
            axes.annotate(
                number(share, 2), (share, y), xytext=(2, 0), textcoords="offset points",
                va="center", size=small(),
            )  # fmt: skip
    _rows(axes, names)
    axes.set_xlabel("% of the machine's ceiling")
    axes.set_xlim(0, 1.2 * max(1.0, axes.get_xlim()[1]))
    legend(axes)
