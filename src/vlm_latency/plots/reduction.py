"""exp6: the speed-up that token reduction claims, against the one that was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlm_latency.plots.notation import LABELS, ends
from vlm_latency.plots.style import (
    FigureContext,
    ReportFigure,
    Style,
    headline,
    headroom,
    legend,
    nothing,
    panels,
    whiskers,
)

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999999", "#000000")
MARKERS = "os^Dv<>P"
NAMES = {**LABELS, "T_LLM_prefill_reduced": "LLM prefill and reducing tokens"}


def claimed_and_measured(
    entries: Sequence[dict[str, Any]],
    components: Sequence[str],
    context: FigureContext,
    style: Style,
) -> Figure:
    """Draw one panel per component, and accuracy against the measured time where there is one.

    Parameters
    ----------
    entries : sequence of dict
        ``method``, ``keep``, ``claimed`` (its ``speed_up``), ``measured`` (component →
        ``speed_up``), ``means`` and ``accuracy``.
    """
    judged = [
        entry for entry in entries if ends(entry["accuracy"])[0] == ends(entry["accuracy"])[0]
    ]
    names = [*components, *(["accuracy"] if judged else [])]
    methods = list(dict.fromkeys(entry["method"] for entry in entries))
    look = {name: (COLOURS[i % 8], MARKERS[i % 8]) for i, name in enumerate(methods)}
    with style.applied():
        figure, axes = panels(
            style,
            context,
            context.title,
            [names[:2], names[2:4], *([["accuracy", "accuracy"]] if judged else [])],
            panel=(5.2, 3.3),
            reading="Above the dashed line a method wins more than its FLOPs promise; those of one claim "
            "stand side by side around it; whiskers, 95 % intervals, may leave the panel.",
        )
        for name in components:
            if name in axes:
                headline(axes[name], f"Speed-up: {NAMES.get(name, name)}")
                _speed_ups(axes[name], entries, name, look)
        if "accuracy" in axes:
            headline(axes["accuracy"], "VQA accuracy against measured latency")
            for entry in judged:
                x, y = entry["means"]["T_total"], entry["accuracy"]
                colour, marker = look[entry["method"]]
                axes["accuracy"].errorbar(
                    ends(x)[0], ends(y)[0], xerr=whiskers(x), yerr=whiskers(y),
                    fmt=marker, color=colour, capsize=2,
                )  # fmt: skip
            axes["accuracy"].set_xlabel("T_total (ms)")
            axes["accuracy"].set_ylabel("VQA accuracy")
        _legend(figure, axes, components, look)
    return figure


def _speed_ups(
    axes: Axes, entries: Sequence[dict[str, Any]], component: str, look: dict[str, Any]
) -> None:
    drawn, seen, beside = [1.0], [1.0], Counter[float]()
    step = 0.012 * (max(entry["claimed"]["speed_up"] or 1.0 for entry in entries) - 1)
    known = [
        (entry, entry["claimed"]["speed_up"], found)
        for entry in entries
        if entry["claimed"]["speed_up"] is not None
        and (found := entry["measured"].get(component)) is not None
        and ends(found["speed_up"])[0] > 0
    ]
    equal = Counter(round(claimed, 3) for _, claimed, _ in known)
    for entry, claimed, found in known:
        colour, marker = look[entry["method"]]
        place = round(claimed, 3)  # those of one claim stand side by side, it is in their middle
        axes.errorbar(
            claimed + step * (beside[place] - (equal[place] - 1) / 2),
            ends(found["speed_up"])[0],
            yerr=whiskers(found["speed_up"]),
            fmt=marker,
            color=colour,
            markersize=5,
            capsize=2,
        )
        beside[place] += 1
        drawn.append(claimed)
        seen += [end for end in ends(found["speed_up"]) if end]
    if len(drawn) == 1:
        nothing(axes)
        return
    top = max(drawn)
    axes.plot([1, top], [1, top], "k--", lw=0.8)
    axes.axhline(1, color="black", lw=0.8)
    room = 0.1 * (max(seen) - min(seen)) + 0.02
    axes.set_ylim(min(seen) - room, max(seen) + room)  # of what was measured: claims go beyond
    axes.set_xlabel("claimed (prefill's FLOPs by FastV's formula)")
    axes.set_ylabel("measured")


def _legend(
    figure: Figure, axes: dict[str, Axes], components: Sequence[str], look: dict[str, Any]
) -> None:
    """Name the methods in a panel whose points leave room above them."""
    last = next(axes[name] for name in (*reversed(components), "accuracy") if name in axes)
    for name, (colour, marker) in look.items():
        last.plot([], [], marker, color=colour, label=name)
    last.plot([], [], "k--", lw=0.8, label="as claimed")
    if isinstance(figure, ReportFigure) and figure.style.paper:
        return legend(last)
    headroom(last, (len(look) + 2) // 2)
    last.legend(loc="upper left", ncols=2)
    return None
