"""How far the instrument can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlm_latency.plots.notation import LABELS, ends, interval
from vlm_latency.plots.style import (
    ALARM,
    COLOURS,
    FigureContext,
    Style,
    column,
    headline,
    legend,
    nothing,
    panels,
    plainly,
    readable_log,
    small,
    whiskers,
)

METHODS = {"timeline": "#009E73", "hook": "#CC79A7", "subtraction": "#D55E00"}
STATES = {"recovered": "o", "disturbed": "s", "undecided": "D", "missed": "X"}


RESOLUTION_MS = 1e-6  # of the host clock, a nanosecond


def calibration(
    injections: pd.DataFrame,
    cases: Sequence[Mapping[str, Any]],
    statistics: Mapping[str, Any],
    context: FigureContext,
    style: Style,
) -> Figure:
    """Draw injected against recovered delays, overhead, false alarms and the methods' failures.

    Parameters
    ----------
    injections : DataFrame
        One row per injection: `component` (a column name such as `T_projector`), `injected_ms`,
        `recovered_ms` (what the component grew by).
    cases : sequence of mapping
        What came of each delay: `component`, `kind`, `delay_ms`, `state`, `tolerance_ms` and
        `error_ms` (estimate of the median of recovered − injected).
    statistics : mapping
        All optional. `overhead`, `null`: what `statistics.compare_paired` gives as a dict (`ratio`, `n_pairs`), instrumented
        and bare against bare; `false_alarms`: what `statistics.a_a_false_alarms` gives (`share`,
        `nominal`, `n_comparisons`); `remainder`: estimate of T_other / T_total; `methods`: by
        method a dict with `below_zero` (shares of requests by component: estimates or numbers
        between 0 and 1), `closure_ms` (estimate of sum of parts − T_total) and `wall_ratio`
        (estimate of wall time over a plain generate()).
    """
    methods = statistics.get("methods") or {}
    overhead = (statistics.get("overhead") or {}).get("ratio")
    said = []
    if cases:
        back = sum(case["state"] in ("recovered", "disturbed") for case in cases)
        said.append(f"{back} of {len(cases)} known delays surely come back")
    if overhead is not None:
        said.append(f"instrumented runs take {interval(overhead)} times a bare one")
    with style.applied():
        title = f"{context.model}: {'; '.join(said) or 'calibration'}"
        names = [["recovered", "error", "ratios"], ["shares", "below", "closure"]]
        figure, axes = panels(style, context, title, names)
        headline(axes["recovered"], "Delays injected and recovered")
        _recovered(axes["recovered"], injections)
        headline(axes["error"], "Error of each recovery")
        _errors(axes["error"], cases)
        headline(axes["ratios"], "Overhead, beside its null")
        _ratios(axes["ratios"], statistics)
        headline(axes["shares"], "False alarms and remainder")
        _shares(axes["shares"], statistics)
        headline(axes["below"], "Below zero before clamping")
        _below_zero(axes["below"], methods)
        headline(axes["closure"], "Sum of parts − T_total")
        _closure(axes["closure"], methods)
    return figure


def _recovered(axes: Axes, injections: pd.DataFrame) -> None:
    if not len(injections):
        return nothing(axes)
    injected, recovered = column(injections, "injected_ms"), column(injections, "recovered_ms")
    for name, group in injections.groupby("component", sort=False):
        axes.scatter(
            column(group, "injected_ms"),
            column(group, "recovered_ms"),
            s=16,
            alpha=0.7,
            linewidths=0,
            color=COLOURS.get(str(name), "black"),
            label=LABELS.get(str(name), str(name)),
        )
    limits = np.array([injected.min(), injected.max()])
    axes.plot(limits, limits, color="black", linewidth=0.8, label="as injected")
    if min(injected.min(), recovered.min()) > 0:
        axes.set(xscale="log", yscale="log")
        readable_log(axes.xaxis, axes.yaxis)
    axes.set(xlabel=f"injected (ms), n = {len(injections)}", ylabel="recovered (ms)")
    legend(axes)
    return None


def _errors(axes: Axes, cases: Sequence[Mapping[str, Any]]) -> None:
    """Every delay's error with its interval, in tolerances: within ± 1 it surely came back."""
    if not cases:
        return nothing(axes)
    shown = set()
    for i, case in enumerate(cases):
        state, scale = case["state"], 1 / case["tolerance_ms"]
        axes.errorbar(
            scale * ends(case["error_ms"])[0],
            i,
            xerr=whiskers(case["error_ms"], scale),
            fmt=STATES[state],
            color=COLOURS.get(case["component"]),
            markerfacecolor="white" if state == "undecided" else None,
            capsize=2,
            label=None if state in shown else state,
        )
        shown.add(state)
    axes.axvspan(-1, 1, color="black", alpha=0.1, lw=0, label="within the tolerance")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=1)
    axes.margins(x=0.1)
    axes.xaxis.set_major_formatter(plainly)
    names = [
        f"{LABELS.get(case['component'], case['component'])} {case['delay_ms']:g} ms"
        + (", device" if case.get("kind") == "device" else "")
        for case in cases
    ]
    axes.set_yticks(range(len(cases)), names, size=small())
    axes.set(xlabel="error / tolerance", ylim=(len(cases) - 0.4, -0.6))
    axes.grid(axis="y", visible=False)
    legend(axes)
    return None


def _ratios(axes: Axes, statistics: Mapping[str, Any]) -> None:
    rows = [
        (label, statistics[key]["ratio"], statistics[key].get("n_pairs"))
        for key, label in (("overhead", "instrumented\n/ bare"), ("null", "bare\n/ bare"))
        if statistics.get(key)
    ]
    if not rows:
        return nothing(axes)
    labels = []
    for i, (label, ratio, pairs) in enumerate(rows):
        value = ends(ratio)[0]
        axes.errorbar(value, i, xerr=whiskers(ratio), fmt="o", color="black", capsize=4)
        axes.annotate(
            interval(ratio), (value, i), xytext=(0, 7), textcoords="offset points",
            ha="center", size=small(),
        )  # fmt: skip
        labels.append(f"{label}\n({pairs} pairs)" if pairs else label)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), labels)
    axes.set(xlabel="ratio of times", ylim=(len(rows) - 0.4, -0.6))
    axes.margins(x=0.5)
    axes.grid(axis="y", visible=False)
    return None


def _shares(axes: Axes, statistics: Mapping[str, Any]) -> None:
    alarms = statistics.get("false_alarms") or {}
    rows = []
    if alarms:
        label = f"false alarms\n({alarms['n_comparisons']} A/A comparisons)"
        rows.append((label, alarms["share"], ALARM))
    if statistics.get("remainder") is not None:
        rows.append(("T_other / T_total", statistics["remainder"], COLOURS["T_other"]))
    if not rows:
        return nothing(axes)
    for i, (_, share, colour) in enumerate(rows):
        value, error = 100 * ends(share)[0], whiskers(share, 100)
        axes.barh(i, value, 0.5, xerr=error, color=colour, capsize=3, alpha=0.8)
        axes.annotate(
            interval(share, "%", 100), (max(0.0, value + float(error[1, 0])), i), xytext=(4, 0),
            textcoords="offset points", va="center", size=small(),
        )  # fmt: skip
    if alarms:
        nominal = 100 * alarms["nominal"]
        own = [-0.4, 0.4]  # the row of false alarms: no other is judged by it
        axes.plot([nominal] * 2, own, "k--", lw=1, label=f"nominal {nominal:g} %")
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axes.set(xlabel="share (%)", ylim=(len(rows) - 0.4, -0.6))
    legend(axes)
    low, high = axes.get_xlim()
    axes.set_xlim(low, 1.8 * high)
    axes.grid(axis="y", visible=False)
    return None


def _below_zero(axes: Axes, methods: Mapping[str, Any]) -> None:
    parts = list(dict.fromkeys(part for m in methods.values() for part in m.get("below_zero", {})))
    if not parts:
        return nothing(axes)
    width = 0.8 / len(methods)
    for i, (method, result) in enumerate(methods.items()):
        for j, part in enumerate(parts):
            share = result.get("below_zero", {}).get(part)
            value, error = 100 * ends(share)[0], whiskers(share, 100)
            if not np.isfinite(value):
                continue
            at = j + (i - (len(methods) - 1) / 2) * width
            axes.bar(at, value, width, yerr=error, color=METHODS.get(method), capsize=2)
            axes.annotate(
                f"{value:.0f}", (at, value + float(error[1, 0])), xytext=(0, 2),
                textcoords="offset points", ha="center", size=small(),
            )  # fmt: skip
        axes.bar(0, 0, color=METHODS.get(method), label=method)
    axes.set_xticks(range(len(parts)), [LABELS.get(part, part) for part in parts])
    axes.set_ylabel("requests (%)")
    axes.set_xlabel(f"n = {_requests(next(iter(methods.values())))}")
    axes.grid(axis="x", visible=False)
    axes.set_ylim(bottom=0, top=max(10.0, axes.get_ylim()[1]))
    legend(axes)
    return None


def _requests(method: Mapping[str, Any]) -> str:
    """Say how many requests a method was tried on."""
    closure = method.get("closure_ms")
    count = closure.get("n") if isinstance(closure, Mapping) else getattr(closure, "n", None)
    return "?" if count is None else str(count)


def _closure(axes: Axes, methods: Mapping[str, Any]) -> None:
    if not methods:
        return nothing(axes)
    labels = []
    for i, (method, result) in enumerate(methods.items()):
        closure = result.get("closure_ms")
        if all(end is None or abs(end) < RESOLUTION_MS for end in ends(closure)):
            closure = 0.0  # rounding of sums, not time
        value, error = ends(closure)[0], whiskers(closure)
        axes.barh(i, value, 0.5, xerr=error, color=METHODS.get(method), capsize=3, alpha=0.8)
        if np.isfinite(value):
            axes.annotate(
                interval(closure, "ms"), (max(0.0, value + float(error[1, 0])), i), xytext=(4, 0),
                textcoords="offset points", va="center", size=small(),
            )  # fmt: skip
        cost = result.get("wall_ratio")
        name = f"{method} (n = {_requests(result)})"
        labels.append(name if cost is None else f"{name}\n{ends(cost)[0]:.2f} × wall time")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(methods)), labels)
    axes.set_xlabel("sum of parts − T_total (ms)")
    axes.grid(axis="y", visible=False)
    axes.invert_yaxis()
    axes.locator_params(axis="x", nbins=5)
    low, high = axes.get_xlim()
    if high - low < RESOLUTION_MS:
        low, high = -1.0, 1.0
    axes.set_xlim(low, high + 0.8 * (high - low))
    return None
