"""Straight lines that a few extreme runs do not decide, and the choice of the line to report."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np
from numpy.typing import ArrayLike

from vlm_latency.statistics.fits import EXACT, LinearFit, linear_fit
from vlm_latency.statistics.results import Floats, Result, as_codes, as_pairs

# Efficiency on normal noise: 95 % (Huber 1981), 98.5 % (Beaton and Tukey 1974); MAD → σ.
HUBER, BISQUARE, MAD = 1.345, 6.0, 1.4826
# So many times as wide, the interval of least squares is ruled by extreme runs.
WIDER = 3
# With fewer points or clusters the jackknife does not hold: 90.5 % over 5 images.
FEWEST = 8
# More groups make the jackknife no better, only slower.
JACKKNIFE = 100


def robust_line(
    x: ArrayLike, y: ArrayLike, clusters: ArrayLike | None = None, *, level: float = 0.95
) -> LinearFit:
    """Fit a straight line that a few extreme runs do not decide.

    Tukey's bisquare (an M-estimate, of 98.5 % efficiency for normal noise): a run 6 scales off the
    line counts for nothing, however far off it is. Scale and start are those of Huber's fit.

    Parameters
    ----------
    x, y, clusters, level
        As in `linear_fit`.

    Returns
    -------
    LinearFit
        The line of the typical run. Its intervals are a jackknife over clusters (dealt into 100
        groups where they are more) with Student's t; below 8 there is none, since leaving one out
        moves the scale, and with it the weights, too far. `r_squared` is None: the share of a
        variance in which extreme runs count means nothing here.

    Examples
    --------
    >>> x = np.arange(10.0)
    >>> y = 5 + 2 * x + np.tile([0.1, -0.1], 5)
    >>> y[8] = 500
    >>> f"{linear_fit(x, y).slope.value:.1f}", f"{robust_line(x, y).slope.value:.1f}"
    ('22.3', '2.0')
    """
    x, y = as_pairs(("x", "y"), x, y)
    codes = as_codes(clusters, x.size)
    plain = linear_fit(x, y, clusters, level=level).solution
    groups = min(int(codes.max()) + 1, JACKKNIFE)
    scale = np.array([1.0, np.abs(x).max()])
    design, start = np.column_stack([np.ones(x.size), x / scale[1]]), plain.beta * scale
    beta = _bisquare(design, y, np.ones((1, x.size), bool), start)
    covariance, method = None, "none"
    if plain.covariance is not None and groups >= FEWEST:
        without = codes % groups != np.arange(groups)[:, None]
        moved = _bisquare(design, y, without, start) - beta
        covariance = groups / (groups - 1) * moved.T @ moved / np.outer(scale, scale)
        unit = "groups of " if groups <= codes.max() else ""
        unit += "points" if clusters is None else "clusters"
        method = f"bisquare, jackknife over {groups} {unit}"
    solution = replace(
        plain, beta=beta[0] / scale, covariance=covariance, freedom=groups - 2, r_squared=None,
        method=method,
    )  # fmt: skip
    intercept, slope = solution.coefficients()
    if plain.covariance is not None and covariance is None:
        few = f"no interval: a robust one does not hold below {FEWEST} independent observations"
        intercept, slope = replace(intercept, note=few), replace(slope, note=few)
    return LinearFit(slope, intercept, None, x.size, method, solution)


@dataclass(frozen=True)
class ChosenLine(Result):
    """Two lines and which of them is the headline; see `headline_line`."""

    chosen: Literal["least squares", "robust"]
    reason: str
    least_squares: LinearFit
    robust: LinearFit

    @property
    def headline(self) -> LinearFit:
        """The line to report."""
        return self.robust if self.chosen == "robust" else self.least_squares


def headline_line(
    x: ArrayLike, y: ArrayLike, clusters: ArrayLike | None = None, *, level: float = 0.95
) -> ChosenLine:
    """Fit a line by least squares and robustly, and say which is the headline.

    Least squares, the mean that a user pays, is, unless extreme runs rule it: its slope lies
    outside of the robust slope's interval at a fifth of the risk (99 % where the level is 95 %), or
    its interval is more than three times as wide. Below that noise alone chooses the robust line
    now and then, where it is worst (92.8 % at 8 points in place of 93.6). Where the robust line has
    no interval, below 8 points or clusters, least squares stays.

    Examples
    --------
    >>> x = np.arange(10.0)
    >>> y = 5 + 2 * x + np.tile([0.1, -0.1], 5)
    >>> headline_line(x, y).chosen
    'least squares'
    >>> y[8] = 500
    >>> print(headline_line(x, y).reason)
    the slope of least squares lies outside of the robust slope's 99 % interval: extreme runs rule it
    """
    plain, robust = (fit(x, y, clusters, level=level) for fit in (linear_fit, robust_line))
    sure = 1 - (1 - level) / 5
    surely = replace(robust.solution, level=sure).coefficients()[1]
    ends = robust.slope.low, robust.slope.high, plain.slope.low, plain.slope.high
    reason = ""
    if None not in ends:
        low, high, plain_low, plain_high = cast("tuple[float, float, float, float]", ends)
        slope = cast("float", plain.slope.value)
        if (surely.above(slope) or surely.below(slope)) and not math.isclose(low, high):
            reason = (
                "the slope of least squares lies outside of the robust slope's "
                f"{100 * sure:.3g} % interval"
            )
        elif plain_high - plain_low > WIDER * (high - low):
            reason = (
                f"the interval of least squares is more than {WIDER} times as wide as the robust "
                "one's"
            )
    if reason:
        return ChosenLine("robust", f"{reason}: extreme runs rule it", plain, robust)
    agree = "least squares and the robust line agree"
    if robust.slope.low is None:
        agree = "the robust line has no interval to choose by"
    return ChosenLine("least squares", agree, plain, robust)


def _bisquare(design: Floats, y: Floats, kept: Floats, start: Floats) -> Floats:
    """Return coefficients, shape (B, k), of the points that each row of `kept` (B, n) keeps.

    Huber's fit, which has one minimum, gives the scale (MAD of its residuals) and the start.
    """
    beta = np.broadcast_to(start, (len(kept), design.shape[1]))
    smallest = max(EXACT * float(np.abs(y).max()), 1e-300)  # a part that takes no time at all
    scale = np.zeros((len(kept), 1))
    products = design[:, :, None] * design[:, None, :]
    for tuning in (HUBER, BISQUARE):
        for _ in range(50):
            residual = np.abs(y - beta @ design.T)
            if tuning == HUBER:
                own = np.where(kept, residual, np.nan)
                # At the limit more than half of the points lie on one line.
                scale = np.maximum(MAD * np.nanmedian(own, axis=1, keepdims=True), smallest)
            far = residual / (tuning * scale)
            weight = (
                np.minimum(1, 1 / np.maximum(far, 1))
                if tuning == HUBER
                else np.maximum(0, 1 - far**2) ** 2
            )
            weight = weight * kept
            gram = np.tensordot(weight, products, axes=1)
            new = np.linalg.solve(gram, (weight @ (design * y[:, None]))[..., None])[..., 0]
            moved = float(np.abs((new - beta) @ design.T / scale).max())
            beta = new
            if moved <= 1e-4:
                break
    return beta
