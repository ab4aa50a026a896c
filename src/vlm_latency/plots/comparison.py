"""compare: how much faster or slower each component became."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from vlm_latency.plots.notation import LABELS, ends, interval
from vlm_latency.plots.style import (
    MUTED,
    FigureContext,
    Style,
    headline,
    nothing,
    panels,
    plainly,
    small,
    whiskers,
)

if TYPE_CHECKING:
    from vlm_latency.statistics import TableComparison

VERDICTS = {"FASTER": "#009E73", "SLOWER": "#D55E00", "SAME": "#333333", "UNDECIDED": MUTED}
MARKERS = "os^Dv<>P"
FEW = 3  # comparisons that a title can tell one by one


def ratios(
    comparisons: Mapping[str, TableComparison],
    baseline: str,
    margin: float,
    context: FigureContext,
    style: Style,
) -> Figure:
    """Draw the ratio candidate / baseline of each component as a forest plot.

    Parameters
    ----------
    comparisons : mapping of candidate's name to TableComparison
        Several candidates stand below each other.
    baseline : str
        What they are compared with.
    margin : float
        Differences up to this share do not matter; drawn as a band.
    """
    names = list(dict.fromkeys(name for c in comparisons.values() for name in c.components))
    count = max(1, len(comparisons))
    row = (0.34 if count == 1 else 0.2) * (1.4 if style.paper else 1.0)  # inches
    with style.applied():
        figure, axes = panels(
            style,
            context,
            told(comparisons, baseline),
            [["ratios"]],
            panel=(8.0, 1.2 + row * len(names) * count),
        )
        plot = axes["ratios"]
        headline(plot, "Ratio with its 95 % interval")
        shown = []
        for i, (run, result) in enumerate(comparisons.items()):
            for j, name in enumerate(names):
                entry = result.components.get(name)
                if entry is None or not ends(entry.ratio)[0] > 0:
                    continue
                shown += [bound for bound in ends(entry.ratio) if bound is not None and bound > 0]
                y = j + (i - (count - 1) / 2) * 0.7 / count
                value = ends(entry.ratio)[0]
                colour = VERDICTS.get(entry.verdict, MUTED)
                plot.errorbar(
                    value,
                    y,
                    xerr=whiskers(entry.ratio),
                    fmt=MARKERS[i % len(MARKERS)],
                    color=colour,
                    capsize=3,
                )
                plot.text(
                    1.01,
                    y,
                    interval(entry.ratio) + ("" if style.paper else f"  {entry.verdict}"),
                    transform=plot.get_yaxis_transform(),
                    va="center",
                    size=small(),
                    color=colour,
                )
            if count > 1:
                plot.plot([], [], MARKERS[i % len(MARKERS)], color="black", label=run)
        if not shown:
            nothing(plot, "nothing to compare")
            return figure
        plot.axvspan(1 - margin, 1 + margin, color="black", alpha=0.1, lw=0, label="margin")
        plot.axvline(1, color="black", linewidth=0.8)
        if max(shown) / min(shown) > 5:
            plot.set_xscale("log", base=2 if max(shown) / min(shown) < 100 else 10)
            plot.xaxis.set_major_formatter(plainly)
        plot.set_yticks(range(len(names)), [LABELS.get(name, name) for name in names])
        plot.set_ylim(len(names) - 0.3, -0.7)
        plot.set_xlabel(f"latency / latency of {baseline}   (below 1: faster)")
        plot.grid(axis="y", visible=False)
        below = ScaledTranslation(0, -0.42, figure.dpi_scale_trans)  # inches: under the axis
        plot.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, 0),
            bbox_transform=plot.transAxes + below,
            ncols=2 if style.paper else min(count + 1, 4),
        )
    return figure


def told(comparisons: Mapping[str, TableComparison], baseline: str) -> str:
    """Tell the verdicts in a sentence, or count them where there are many."""
    if len(comparisons) > FEW:
        verdicts = Counter(result.verdict or "UNDECIDED" for result in comparisons.values())
        counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
        return f"{len(comparisons)} comparisons with {baseline}: {counts}"
    said = []
    for run, result in comparisons.items():
        total = result.components.get("T_total")
        ratio = f" × {interval(total.ratio)}" if total else ""
        said.append(f"{run}{ratio} {result.verdict or 'UNDECIDED'}")
    matched = dict.fromkeys(str(result.n_matched) for result in comparisons.values())
    numbers = f", T_total, {' and '.join(matched)} matched: " if said else ": "
    return f"Against {baseline}{numbers}" + ("; ".join(said) or "nothing to compare")
