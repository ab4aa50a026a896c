"""Cells of the table of coverage, what was found for them, and the page."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date

import numpy as np

from vlm_latency.statistics import Estimate

Draw = Callable[[np.random.Generator], Estimate | float]
GOAL, CEILING = 0.93, 0.975
SIGMAS = 2  # Monte Carlo errors by which a cell may miss a limit
SEED = 12


@dataclass(frozen=True)
class Cell:
    """One statistic on one kind of data.

    `goal` says whether the goals are about it, `exact` whether it should not be conservative:
    order statistics and ties may be. `truth` that takes
    long to compute is a function. `draw` returns an estimate, to hold `truth`, or 1.0 and 0.0
    for what was inside and not.
    """

    statistic: str
    data: str
    n: str
    truth: float | Callable[[], float]
    draw: Draw
    runs: int = 1_000
    goal: bool = True
    exact: bool = True


@dataclass(frozen=True)
class Row:
    """What was found for a cell."""

    cell: Cell
    held: float
    runs: int
    without: float
    warned: float

    @property
    def error(self) -> float:
        """Monte Carlo standard error of `held`, with one success and one failure added."""
        p = (self.held * self.runs + 1) / (self.runs + 2)
        return math.sqrt(p * (1 - p) / max(self.runs, 1))

    def outside(self, sigmas: float = SIGMAS) -> bool:
        """Whether a cell of the goals misses them by more than so many Monte Carlo errors."""
        if not self.cell.goal or not self.runs:
            return False
        low = self.held < GOAL - sigmas * self.error
        return low or (self.cell.exact and self.held > CEILING + sigmas * self.error)


@dataclass(frozen=True)
class Verdicts:
    """Shares of the verdicts of one claim on its made-up data."""

    claim: str
    n: str
    goal: str
    right: float
    opposite: float
    undecided: float


def simulate(cell: Cell, scale: float = 1.0) -> Row:
    """Draw a cell's data `scale` × its runs times and count the intervals that hold the truth.

    An end that is None is unbounded and holds everything on its side; an estimate without either
    is no interval and is counted apart.
    """
    name = f"{cell.statistic}|{cell.data}|{cell.n}"
    rng = np.random.default_rng([SEED, zlib.crc32(name.encode())])
    truth = cell.truth() if callable(cell.truth) else cell.truth
    held = runs = without = warned = 0
    for _ in range(max(20, round(cell.runs * scale))):
        found = cell.draw(rng)
        if isinstance(found, float):
            held, runs = held + int(found), runs + 1
        elif found.low is None and found.high is None:
            without += 1
        else:
            slack = 1e-12 * abs(truth)
            low = found.low is None or found.low <= truth + slack
            high = found.high is None or found.high >= truth - slack
            held, runs = held + int(low and high), runs + 1
            warned += "too narrow" in found.note
    total = runs + without
    return Row(
        cell, held / runs if runs else math.nan, runs, without / total, warned / max(runs, 1)
    )


def page(
    rows: list[Row],
    verdicts: list[Verdicts],
    today: date,
    scale: float = 1.0,
    minutes: float = 0.0,
    processes: int = 1,
) -> str:
    """Write what was found as Markdown."""
    outside = [row for row in rows if row.outside()]
    near = [row for row in rows if row.outside(0) and not row.outside()]
    lines = [
        "# How often the printed intervals hold the truth",
        "",
        f"Nominal 95 %. Made on {today.isoformat()} by `python tests/coverage --scale {scale:g}` "
        f"with seed {SEED}; every cell has its own stream of it, whatever the number of processes "
        "(the shares of one variance are of the same draws, and so are the held-out errors of as many shapes). "
        f"It took {minutes:.0f} minutes ({processes} process{'es' * (processes > 1)}). ± is one Monte Carlo standard error.",
        "",
        "Goals: at least 93 % on normal, lognormal (σ ≤ 0.3 from n = 8, ≤ 0.5 from n = 20) and "
        "clustered data, at most 97.5 % for continuous statistics. *shown* are data of which few "
        "values know nothing (heavy tails, rare modes), statistics that may be conservative keep "
        "only the lower goal: order statistics (of held-out errors, too) and ties; exact intervals of a count; "
        "shares of variance that are zero; what is no interval but a verdict, of which the share is told "
        "that raises no false alarm; lines with runs far too slow and the error "
        "of 8 held-out shapes, of which few values know little; and intercepts "
        "where noise grows with latency (the noise of the sweep's end widens what its start tells). *warned* is the share of intervals whose note says that they may be "
        "too narrow: one value, or image, makes more than half of the variance. *no interval* is "
        "the share of samples that got none, with the reason in the note.",
        "",
        f"Outside of the goals by more than {SIGMAS} Monte Carlo errors: "
        + ("; ".join(f"{r.cell.statistic} ({r.cell.data}, {r.cell.n})" for r in outside) or "none")
        + f". Outside by the point alone, which so few draws cannot decide: {len(near)}.",
        "",
        "| statistic | data | n | actual, % | ± | warned, % | no interval, % | goal |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cell = row.cell
        goal = "shown" if not cell.goal else "93–97.5" if cell.exact else "≥ 93"
        held = f"{100 * row.held:.1f}" if row.runs else "none"
        mark = " **outside**" if row.outside() else ""
        lines.append(
            f"| {cell.statistic} | {cell.data} | {cell.n} | {held} | {100 * row.error:.1f} | "
            f"{100 * row.warned:.0f} | {100 * row.without:.0f} | {goal}{mark} |"
        )
    lines += [
        "",
        "## Verdicts of the claims on data built to satisfy or violate them",
        "",
        "Goal: the right verdict in at least 80 %, the opposite one in at most 5 %. A tail cannot be "
        "contradicted below 437 runs: P99 then has no upper bound, whatever the data.",
        "",
        "| claim and truth | n | right verdict | right, % | opposite, % | undecided, % |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for found in verdicts:
        shares = (found.right, found.opposite, found.undecided)
        numbers = " | ".join(f"{100 * share:z.0f}" for share in shares)
        lines.append(f"| {found.claim} | {found.n} | {found.goal} | {numbers} |")
    return "\n".join(lines) + "\n"
