"""A floor and a line: where launches set the time of small requests, tokens cost nothing at first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import scipy
from numpy.typing import ArrayLike

from vlm_latency.statistics.fits import EXACT
from vlm_latency.statistics.results import Estimate, Floats, Result, as_codes, as_pairs, student

# A line has two parameters and a floor with a line three; two points more can tell them apart.
POINTS = 5
CANDIDATES = 400


@dataclass(frozen=True)
class FloorAndLine(Result):
    """y = floor + slope·max(0, x − free); see `floor_and_line`."""

    holds: Literal["line", "floor and line", "floor", "undecided"]
    p_value: float | None
    floor: Estimate
    slope: Estimate
    free: Estimate
    n: int
    n_points: int
    method: str
    note: str
    coefficients: tuple[float, float, float] = field(repr=False, metadata={"plain": False})

    def predict(self, x: ArrayLike) -> Floats:
        """Return the floor and the line at `x`."""
        floor, slope, free = self.coefficients
        return np.asarray(floor + slope * np.maximum(0, np.asarray(x, float) - free))


def floor_and_line(
    x: ArrayLike,
    y: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    level: float = 0.95,
    resamples: int = 999,
    seed: int = 0,
) -> FloorAndLine:
    """Fit max(floor, a + b·x), say whether it or one line holds, and below which x one costs nothing.

    Parameters
    ----------
    x, y : array_like, shape (n,)
        Such as vision tokens and T_LLM_prefill in ms; y above zero.
    clusters : array_like, shape (n,), optional
        The request of each run. Runs of one request at one x are one point, their median: a
        request's own effect is no noise of runs, and a few extreme runs do not rule.
    level : float
        Confidence level; a floor is seen when p < 1 − level.
    resamples, seed : int
        Of the wild bootstrap that gives `p_value`.

    Returns
    -------
    FloorAndLine
        `holds` is "floor and line" when one line is rejected in its favour (wild bootstrap of
        the gain over every place of the bend) and it fits better than a parabola, which has as
        many parameters: a cost that grows all along is no floor, and where the parabola fits
        better the answer is "undecided". It is "floor" when the line is not rejected and its slope
        could be zero, else "line"; "undecided" below 5 points. `floor` is in units of y, `slope`, of
        the rising part, in units of y per x, `free` in units of x: below it one x more costs
        nothing. Intervals are profiles (F against the best fit, relative errors) over all places
        of the bend; an end that the data leave open is None. Unless "floor and line" holds,
        `free` has no value, and where "line" holds `slope` is that of the line.

    Raises
    ------
    DataError
        For NaN or infinity, unequal lengths, or y not above zero.

    Examples
    --------
    >>> tokens = np.repeat(np.arange(200.0, 1500, 100), 2)
    >>> ms = np.maximum(20, 20 + 0.02 * (tokens - 650)) + np.tile([0.05, -0.05], 13)
    >>> found = floor_and_line(tokens, ms)
    >>> found.holds, f"{found.free:.0f}"
    ('floor and line', '650 [647, 653]')
    """
    x, y = as_pairs(("x", "y"), x, y)
    as_pairs(("y", "y"), y, y, positive=True)
    n = x.size
    if clusters is not None:
        x, y = _medians(x, y, clusters)
    kinds, points = np.unique(x), x.size
    method = f"least squares of relative errors on {points} points, profile of F"

    def none(note: str) -> Estimate:
        return Estimate(None, None, None, level, n, "none", note)

    if points < POINTS or kinds.size < POINTS:
        note = f"{kinds.size} different x; telling a floor from a line needs {POINTS}"
        nothing = none(note)
        return FloorAndLine(
            "undecided", None, nothing, nothing, nothing, n, points, "none", note, (np.nan,) * 3
        )
    bends = np.unique(np.append(np.linspace(kinds[0], kinds[-2], CANDIDATES), kinds[:-1]))
    rough = _fit(x, y, np.ones(points), bends)
    weight = 1 / np.maximum(_at(x, rough, bends), y.min() / 2)
    rss = _fit(x, y, weight, bends)["rss"]
    # Once more, finely, around the places that the data allow.
    allowed = np.flatnonzero(_slack(rss, points, level) >= 0)
    ends = bends[max(allowed[0] - 1, 0)], bends[min(allowed[-1] + 1, bends.size - 1)]
    bends = np.unique(np.append(bends, np.linspace(*ends, CANDIDATES)))
    fits = _fit(x, y, weight, bends)
    rss, best = fits["rss"], int(fits["rss"].argmin())
    value = {name: float(fits[name][best]) for name in ("floor", "slope")}
    p = _gain(x, y, weight, bends, resamples, seed)
    slack = _slack(rss, points, level)
    inside = slack >= 0

    def profile(name: str) -> Estimate:
        half = np.sqrt(slack[inside] / fits[f"{name}_information"][inside])
        low, high = (fits[name][inside] - half).min(), (fits[name][inside] + half).max()
        return Estimate(value[name], float(low), float(high), level, n, method)

    floor, slope = profile("floor"), profile("slope")
    line = _fit(x, y, weight, kinds[:1])
    of_line = _slope(line, points, level, n)
    bend = float(bends[best])
    if p < 1 - level and _rising_parabola(x, y, weight) < rss[best]:
        note = "one line does not hold, and costs that grow all along fit better than a floor"
        nothing = none(note)
        return FloorAndLine(
            "undecided", p, nothing, nothing, nothing, n, points, method, note, (np.nan,) * 3
        )
    if p < 1 - level and value["slope"] > 0:
        first, last = map(float, bends[inside][[0, -1]])
        low = first if first > bends[0] else None
        high = last if last < bends[-1] else None
        open_ends = " and ".join(
            f"no {name} end within the points"
            for name, end in (("lower", low), ("upper", high))
            if end is None
        )
        free = Estimate(bend, low, high, level, n, method, open_ends)
        note = f"below {bend:.4g} one more costs nothing"
        return FloorAndLine(
            "floor and line", p, floor, slope, free, n, points, method, note,
            (value["floor"], value["slope"], bend),
        )  # fmt: skip
    holds: Literal["line", "floor"] = "line" if of_line.above(0) or of_line.below(0) else "floor"
    note = "no floor is seen: one line holds" if holds == "line" else "no slope is seen: a floor"
    start = float(line["floor"][0])
    return FloorAndLine(
        holds, p, floor if holds == "floor" else none(note), of_line, none(note), n, points,
        method, note, (start, of_line.value or 0.0, float(kinds[0])),
    )  # fmt: skip


def _slope(line: dict[str, Floats], points: int, level: float, n: int) -> Estimate:
    """Give the slope of the one line with its interval."""
    value = float(line["slope"][0])
    error = np.sqrt(line["rss"][0] / (points - 2) / line["slope_information"][0])
    half = float(error * student(level, points - 2))
    method = f"least squares of relative errors on {points} points"
    return Estimate(value, value - half, value + half, level, n, method)


def _slack(rss: Floats, points: int, level: float) -> Floats:
    """Return how far each bend's sum of squares is below what the best one's F allows."""
    least = max(float(rss.min()), EXACT**2 * points)
    limit = 1 + scipy.special.fdtri(1, points - 3, level) / (points - 3)
    return np.asarray(least * limit - rss)


def _medians(x: Floats, y: Floats, clusters: ArrayLike) -> tuple[Floats, Floats]:
    import pandas as pd

    runs = pd.DataFrame({"cluster": as_codes(clusters, x.size), "x": x, "y": y})
    points = runs.groupby(["cluster", "x"], as_index=False)["y"].median()
    return points["x"].to_numpy(), points["y"].to_numpy()


def _fit(x: Floats, y: Floats, weight: Floats, bends: Floats) -> dict[str, Floats]:
    """Fit floor and slope for every place of the bend, in closed form."""
    w = weight**2
    past = np.maximum(0, x - bends[:, None])
    total, first, second = w.sum(), past @ w, past**2 @ w
    ones_y, past_y = w @ y, past @ (w * y)
    determinant = total * second - first**2
    slope = (total * past_y - first * ones_y) / determinant
    floor = (ones_y - slope * first) / total
    rss = (w * (y - floor[:, None] - slope[:, None] * past) ** 2).sum(axis=1)
    return {
        "floor": floor,
        "slope": slope,
        "rss": rss,
        "slope_information": determinant / total,
        "floor_information": determinant / second,
    }


def _rising_parabola(x: Floats, y: Floats, weight: Floats) -> float:
    """Return the sum of squares of the best parabola that neither falls nor flattens."""
    past = (x - x.min()) / np.ptp(x)
    design = weight[:, None] * np.column_stack([np.ones(x.size), past, past**2])
    return float(scipy.optimize.nnls(design, weight * y)[1] ** 2)


def _at(x: Floats, fits: dict[str, Floats], bends: Floats) -> Floats:
    best = int(fits["rss"].argmin())
    return np.asarray(fits["floor"][best] + fits["slope"][best] * np.maximum(0, x - bends[best]))


def _gain(x: Floats, y: Floats, weight: Floats, bends: Floats, resamples: int, seed: int) -> float:
    """Return p of what the best bend gains over one line, by signs put on the line's residuals."""
    root = np.column_stack([weight, weight * x])
    basis = np.linalg.qr(root)[0]
    fitted = basis @ (basis.T @ (weight * y))
    residual = weight * y - fitted
    free = 1 - (basis**2).sum(axis=1)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(resamples, x.size))
    samples = np.vstack([weight * y, fitted + signs * residual / np.sqrt(free)])
    own = samples - (samples @ basis) @ basis.T
    of_line = (own**2).sum(axis=1)
    of_bend = of_line.copy()
    squares = (samples**2).sum(axis=1)
    for past in np.maximum(0, x - bends[:: max(1, bends.size // 60), None]):
        # Of positive slope only: a fall and then a plateau is no floor.
        q = np.linalg.qr(np.column_stack([weight, weight * past]))[0]
        q[:, 1] *= np.sign(q[:, 1] @ (weight * past))
        along = samples @ q
        rest = squares - along[:, 0] ** 2 - np.maximum(along[:, 1], 0) ** 2
        of_bend = np.minimum(of_bend, rest)
    gain = of_line / np.maximum(of_bend, 1e-20 * squares)
    if of_line[0] <= 1e-20 * squares[0]:
        return 1.0
    return float((1 + (gain[1:] >= gain[0] * (1 - 1e-9)).sum()) / (1 + resamples))
