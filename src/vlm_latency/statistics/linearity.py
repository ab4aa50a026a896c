"""Straight line or staircase: does latency follow the tokens, or the steps of the tile grid?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from vlm_latency.statistics.fits import EXACT, linear_fit, relative_weights
from vlm_latency.statistics.results import Estimate, Floats, Result, as_codes, as_pairs, as_values

# Pure error judged by fewer degrees of freedom than this is no yardstick.
REPLICATES = 5
# Fewer points can be put in too few orders for a permutation test to say anything at 5 %.
POINTS = 6


@dataclass(frozen=True)
class LinearityTest(Result):
    """Whether the means over x depart from a line; see `linearity_test`."""

    verdict: Literal["line", "not a line", "undecided"]
    p_value: float | None
    statistic: float | None
    max_departure: float
    n: int
    n_levels: int
    method: str
    note: str = ""


def linearity_test(
    x: ArrayLike,
    y: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    level: float = 0.95,
    permutations: int = 1_999,
    seed: int = 0,
) -> LinearityTest:
    """Test for departure from a straight line.

    Runs of one request are no replicates: what the request does to all of them would count as a
    bend (a true line is called bent in 52 % of sweeps when requests differ by 1 %). They are one
    point, their mean. Errors are taken relative to the line, which is how latencies scatter: long
    requests scatter more, and to shuffle them among short ones calls too many lines bent.
    With replicates (several requests at one x) by the F test for lack of fit: the spread of the means
    about the line against the spread within each x. Without, by a permutation test of von
    Neumann's ratio: next to a bend or a step, neighbouring residuals are alike.

    Parameters
    ----------
    x, y : array_like, shape (n,)
    clusters : array_like, shape (n,), optional
        The request of each run.
    level : float
        "not a line" when p < 1 − level; "line" means that no departure could be seen.
    permutations, seed : int
        Of the permutation test.

    Returns
    -------
    LinearityTest
        `max_departure` is the largest distance of a mean from the line as a share of the line
        there: a departure can be certain and too small to matter. Undecided below 3 different x,
        or below 6 points without replicates.

    Raises
    ------
    DataError
        For NaN or infinity, unequal lengths, or a single value of x.

    Examples
    --------
    >>> x = np.repeat([1, 2, 3, 4], 5)
    >>> noise = np.tile([-0.2, -0.1, 0.0, 0.1, 0.2], 4)
    >>> linearity_test(x, 10 * x + noise).verdict
    'line'
    >>> linearity_test(x, x**2 + noise).verdict
    'not a line'
    """
    x, y = as_pairs(("x", "y"), x, y)
    if clusters is not None:
        x, y = _request_means(x, y, clusters)
    linear_fit(x, y)  # refuses a single x
    weight = relative_weights(x, y)
    basis = np.linalg.qr(weight[:, None] * np.column_stack([np.ones(x.size), x - x.mean()]))[0]
    residual = weight * y - basis @ (basis.T @ (weight * y))
    fitted = y - residual / weight
    _, codes, counts = np.unique(x, return_inverse=True, return_counts=True)
    means = np.bincount(codes, weights=residual) / counts
    levels, n = counts.size, x.size
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.abs(means[codes] / weight / fitted)
    departure = float(np.nan_to_num(relative, nan=0.0, posinf=np.inf).max())  # 0 / 0: on the line
    rounding = EXACT * float(np.abs(weight * y).max())

    def result(
        p: float | None, statistic: float | None, method: str, note: str = ""
    ) -> LinearityTest:
        verdict: Literal["line", "not a line", "undecided"] = "undecided"
        if p is not None:
            verdict = "not a line" if p < 1 - level else "line"
        if verdict == "line":
            note = note or "no departure from a line is seen"
        return LinearityTest(verdict, p, statistic, departure, n, levels, method, note)

    if levels < 3:
        return result(None, None, "none", f"any {levels} points of x lie on a line; needs 3")
    if np.abs(residual).max() <= rounding:
        return result(1.0, 0.0, "none", "every point lies on the line")
    lack = (counts * means**2).sum()
    pure = ((residual - means[codes]) ** 2).sum()
    if n - levels >= REPLICATES:
        method = f"F test for lack of fit ({levels - 2}, {n - levels})"
        if pure <= rounding**2 * n:
            return result(
                0.0, None, method, "replicates do not vary, and their means leave the line"
            )
        F = (lack / (levels - 2)) / (pure / (n - levels))
        return result(
            float(scipy.special.fdtrc(levels - 2, n - levels, max(F, 0))), float(F), method
        )
    if n < POINTS:
        return result(None, None, "none", f"{n} points without replicates; needs {POINTS}")
    order = np.argsort(x, kind="stable")
    ordered = residual[order]
    shuffled = np.random.default_rng(seed).permuted(np.tile(ordered, (permutations, 1)), axis=1)
    # Shuffled residuals get a line of their own taken out, as the residuals had.
    basis = basis[order]
    shuffled -= (shuffled @ basis) @ basis.T
    ratio = _von_neumann(ordered[None])[0]
    p = (1 + (_von_neumann(shuffled) <= ratio * (1 + 1e-9)).sum()) / (1 + permutations)
    return result(float(p), float(ratio), "permutation test of von Neumann's ratio")


@dataclass(frozen=True)
class BreakPoint(Result):
    """A step of the staircase: where it lies, and how high it is beside what the line expects."""

    x: float
    step_from: float
    step_to: float
    jump: Estimate
    jump_of_line: float


@dataclass(frozen=True)
class Staircase(Result):
    """Line against staircase; see `staircase`."""

    verdict: Literal["line", "staircase", "line with steps", "undecided"]
    aicc: dict[str, float]
    r_squared: dict[str, float]
    p_value: float | None
    break_points: tuple[BreakPoint, ...]
    n: int
    method: str
    note: str = ""


def staircase(
    x: ArrayLike,
    y: ArrayLike,
    steps: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    level: float = 0.95,
) -> Staircase:
    """Compare a line in `x` with a constant per step of the tile grid, and with both.

    Runs of one request are one point, their mean, as in `linearity_test`: what the request does to
    all of them would count as its step.

    Parameters
    ----------
    x, y : array_like, shape (n,)
        Such as vision tokens and T_vision_encoder in ms.
    steps : array_like of numbers, shape (n,)
        The step each point stands on, such as `num_crops`.
    clusters : array_like, shape (n,), optional
        The request of each run.
    level : float
        Confidence level of the jumps (Welch's t).

    Returns
    -------
    Staircase
        The model of the lowest AICc wins; a simpler one within 2 of it is preferred (line,
        staircase, line with steps, in this order). `p_value` is of the F test of what steps add
        to the line. `break_points` lie half-way between neighbouring steps.

    Raises
    ------
    DataError
        For NaN or infinity, unequal lengths, or a single value of x.

    Examples
    --------
    >>> tokens = np.array([100, 120, 140, 160, 200, 220, 240, 260, 300, 320, 340, 360])
    >>> crops = np.repeat([1, 2, 3], 4)
    >>> wiggle = np.tile([0.1, -0.1, 0.2, -0.2], 3)
    >>> found = staircase(tokens, 50 * crops + wiggle, crops)
    >>> found.verdict, [point.x for point in found.break_points]
    ('staircase', [180.0, 280.0])
    """
    x, y = as_pairs(("x", "y"), x, y)
    steps = as_values("steps", steps)
    as_pairs(("x", "steps"), x, steps)
    if clusters is not None:
        (x, y), steps = _request_means(x, y, clusters), _request_means(x, steps, clusters)[1]
    line = linear_fit(x, y, level=level)
    kinds, codes = np.unique(steps, return_inverse=True)
    n = x.size
    stairs = np.eye(kinds.size)[codes]
    scaled = x / np.abs(x).max()
    designs = {
        "line": np.column_stack([np.ones(n), scaled]),
        "staircase": stairs,
        "line with steps": np.column_stack([stairs, scaled]),
    }
    floor = (EXACT * max(float(np.abs(y).max()), 1e-100)) ** 2 * n
    spread = max(float(((y - y.mean()) ** 2).sum()), floor)
    fits = {name: _rss(design, y, floor) for name, design in designs.items()}
    points = _break_points(x, y, codes, kinds, line.slope.value or 0.0, level=level)
    r_squared = {name: 1 - rss / spread if spread else 1.0 for name, (rss, _) in fits.items()}
    rss, rank = fits["line with steps"]
    if kinds.size < 2 or n <= rank + 2:
        note = f"{n} points on {kinds.size} steps; needs two steps and {rank + 3} points"
        return Staircase("undecided", {}, r_squared, None, points, n, "AICc", note)
    aicc = {
        name: float(n * np.log(rss / n) + 2 * (k + 1) + 2 * (k + 1) * (k + 2) / (n - k - 2))
        for name, (rss, k) in fits.items()
    }
    verdict: Literal["line", "staircase", "line with steps"] = "line with steps"
    if aicc["line"] <= min(aicc.values()) + 2:
        verdict = "line"
    elif aicc["staircase"] <= min(aicc.values()) + 2:
        verdict = "staircase"
    line_rss, line_rank = fits["line"]
    p_value = None
    if rank > line_rank:
        F = ((line_rss - rss) / (rank - line_rank)) / (rss / (n - rank))
        p_value = float(scipy.special.fdtrc(rank - line_rank, n - rank, max(F, 0)))
    return Staircase(verdict, aicc, r_squared, p_value, points, n, "AICc; F test over the line")


def _request_means(x: Floats, y: Floats, clusters: ArrayLike) -> tuple[Floats, Floats]:
    _, codes = np.unique(np.stack([as_codes(clusters, x.size), x]), axis=1, return_inverse=True)
    runs = np.bincount(codes)
    return np.bincount(codes, weights=x) / runs, np.bincount(codes, weights=y) / runs


def _von_neumann(ordered: Floats) -> Floats:
    ratio: Floats = (np.diff(ordered, axis=1) ** 2).sum(axis=1) / (ordered**2).sum(axis=1)
    return ratio


def _rss(design: Floats, y: Floats, floor: float) -> tuple[float, int]:
    beta, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    return max(float(((y - design @ beta) ** 2).sum()), floor), int(rank)


def _break_points(
    x: Floats, y: Floats, codes: NDArray[np.int64], kinds: Floats, slope: float, *, level: float
) -> tuple[BreakPoint, ...]:
    points = []
    for step in range(kinds.size - 1):
        lower, upper = codes == step, codes == step + 1
        points.append(
            BreakPoint(
                float(x[lower].max() + x[upper].min()) / 2,
                float(kinds[step]),
                float(kinds[step + 1]),
                _jump(y[lower], y[upper], level),
                slope * float(x[upper].mean() - x[lower].mean()),
            )
        )
    return tuple(points)


def _jump(lower: Floats, upper: Floats, level: float) -> Estimate:
    value, n = float(upper.mean() - lower.mean()), lower.size + upper.size
    if min(lower.size, upper.size) < 2:
        return Estimate(value, None, None, level, n, "none", "an interval needs 2 points per step")
    if max(np.ptp(lower), np.ptp(upper)) <= EXACT * np.abs(upper).max():
        return Estimate(value, value, value, level, n, "no variation", "steps are flat")
    interval = scipy.stats.ttest_ind(upper, lower, equal_var=False).confidence_interval(level)
    return Estimate(value, float(interval.low), float(interval.high), level, n, "Welch's t")
