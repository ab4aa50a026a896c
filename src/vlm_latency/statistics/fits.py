"""Lines and power laws through latencies, with intervals that hold under unequal noise.

Long requests scatter more than short ones, so intervals never assume equal noise: they are HC3
(MacKinnon and White 1985), or its version by clusters (CR3, a jackknife over images) when
`clusters` are given, with Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlm_latency.errors import DataError
from vlm_latency.statistics.results import (
    Estimate,
    Floats,
    Result,
    as_codes,
    as_pairs,
    as_values,
    student,
)

# A residual below this share of the largest y is rounding: the points lie on the fit.
EXACT = 1e-10


@dataclass(frozen=True)
class LinearFit(Result):
    """y = intercept + slope·x; see `linear_fit`."""

    slope: Estimate
    intercept: Estimate
    r_squared: float | None
    n: int
    method: str
    solution: Solution = field(repr=False, metadata={"plain": False})

    def predict(self, x: ArrayLike) -> Floats:
        """Return the line at `x`."""
        return self.solution.predict(_with_ones(np.asarray(x, float)))

    def band(self, x: ArrayLike) -> tuple[Floats, Floats]:
        """Return the lower and upper limit of the line (not of single points) at each `x`."""
        return self.solution.band(_with_ones(np.asarray(x, float)))

    def growth(self, x0: float, x1: float) -> Estimate:
        """Return the line at `x1` over the line at `x0`, by the delta method.

        >>> print(linear_fit([0, 1, 2, 3], [10.0, 11.0, 12.0, 13.0]).growth(0, 10))
        2 [2, 2]; every point lies on the fit
        """
        ends = _with_ones(np.array([x0, x1], float))
        start, end = self.solution.predict(ends)
        if start <= 0:
            note = f"the line at {x0:g} is {start:.4g}: no ratio to it"
            return Estimate(None, None, None, self.solution.level, self.n, "none", note)
        ratio = end / start
        gradient = (ends[1] - ratio * ends[0]) / start
        return self.solution.estimate(float(ratio), gradient)

    def banded(self, x: ArrayLike, points: int = 50) -> BandedFit:
        """Return the line with its band at so many points over the range of `x`."""
        x = np.asarray(x, float)
        at = np.linspace(x.min(), x.max(), points)
        band = dict(zip(("x", "low", "high"), (at, *self.band(at)), strict=True))
        return BandedFit(self.slope, self.intercept, self.r_squared, self.n, self.method, band)


@dataclass(frozen=True)
class BandedFit(Result):
    """A line with its confidence band, arrays `x`, `low` and `high`; see `LinearFit.banded`."""

    slope: Estimate
    intercept: Estimate
    r_squared: float | None
    n: int
    method: str
    band: dict[str, Floats] = field(repr=False)


@dataclass(frozen=True)
class MultiLinearFit(Result):
    """y = intercept + Σ coefficient·x; see `multi_linear_fit`."""

    coefficients: dict[str, Estimate]
    intercept: Estimate | None
    r_squared: float | None
    n: int
    method: str
    solution: Solution = field(repr=False, metadata={"plain": False})

    def predict(self, X: ArrayLike) -> Floats:
        """Return the fit at each row of `X`, shape (n, k)."""
        X = np.asarray(X, float)
        return self.solution.predict(X if self.intercept is None else _with_ones(X))


@dataclass(frozen=True)
class PowerLawFit(Result):
    """y = scale·x^exponent; see `power_law_fit`."""

    exponent: Estimate
    scale: Estimate
    r_squared: float | None
    n: int
    method: str

    def predict(self, x: ArrayLike) -> Floats:
        """Return the law at `x`."""
        assert self.scale.value is not None and self.exponent.value is not None
        return self.scale.value * np.asarray(x, float) ** self.exponent.value


def linear_fit(
    x: ArrayLike, y: ArrayLike, clusters: ArrayLike | None = None, *, level: float = 0.95
) -> LinearFit:
    """Fit a straight line by least squares.

    Parameters
    ----------
    x, y : array_like, shape (n,)
    clusters : array_like, shape (n,), optional
        The image (or request) of each point, where points of one are alike.
    level : float
        Confidence level of the intervals.

    Returns
    -------
    LinearFit
        The slope is in units of y per unit of x. Points exactly on the line give intervals of
        width zero; two points give none.

    Raises
    ------
    DataError
        For NaN or infinity, unequal lengths, or a single value of x.

    Examples
    --------
    >>> fit = linear_fit([1, 2, 3, 4, 5], [12.1, 13.9, 16.2, 17.8, 20.1])
    >>> f"{fit.slope:.2f}", f"{fit.r_squared:.3f}"
    ('1.99 [1.77, 2.21]', '0.997')
    """
    x, y = as_pairs(("x", "y"), x, y)
    solution = _solve(_with_ones(x), y, ("intercept", "x"), clusters, level)
    intercept, slope = solution.coefficients()
    return LinearFit(slope, intercept, solution.r_squared, x.size, solution.method, solution)


def multi_linear_fit(
    X: ArrayLike,
    y: ArrayLike,
    names: Sequence[str],
    clusters: ArrayLike | None = None,
    *,
    intercept: bool = True,
    level: float = 0.95,
) -> MultiLinearFit:
    """Fit y on several columns by least squares, such as T_total on crops and output tokens.

    Parameters
    ----------
    X : array_like, shape (n, k)
    y : array_like, shape (n,)
    names : sequence of k strings
    clusters : array_like, shape (n,), optional
        The image of each row.
    intercept : bool
        Whether to fit a constant beside the columns.

    Raises
    ------
    DataError
        As `linear_fit`, and when a column is a combination of the others.

    Examples
    --------
    >>> X = [[1, 0], [2, 1], [3, 5], [5, 2]]  # 5 ms, 3 ms per crop and 2 ms per token
    >>> fit = multi_linear_fit(X, [8, 13, 24, 24], ["crop", "token"])
    >>> {name: round(e.value, 9) for name, e in fit.coefficients.items()}
    {'crop': 3.0, 'token': 2.0}
    """
    y = as_values("y", y)
    X = np.asarray(X, dtype=float)
    if X.shape != (y.size, len(names)) or not np.isfinite(X).all():
        raise DataError(
            f"X of shape {X.shape} found; expected {(y.size, len(names))}: one row per y, one "
            "column per name, without NaN"
        )
    design = _with_ones(X) if intercept else X
    solution = _solve(design, y, (*["intercept"] * intercept, *names), clusters, level)
    estimates = solution.coefficients()
    return MultiLinearFit(
        dict(zip(names, estimates[intercept:], strict=True)),
        estimates[0] if intercept else None,
        solution.r_squared,
        y.size,
        solution.method,
        solution,
    )


def marginal_change(
    x: ArrayLike, y: ArrayLike, clusters: ArrayLike | None = None, *, level: float = 0.95
) -> Estimate:
    """Return how much what one x more costs changes over the sweep, as a share of its mean.

    (slope at the largest x − slope at the smallest) / mean slope, of y = a + b·x + c·x². An
    offset, which makes the exponent of `power_law_fit` small, leaves it as it is. 0 for a line,
    below 0 where costs fall, 2 where one x more costs nothing at the start.

    The fit is of relative errors (weights 1 / line), which is how latencies scatter: the start of
    the sweep, where they are small, tells its slope better than by equal weights.

    Returns
    -------
    Estimate
        By the delta method from HC3 or CR3 over clusters. None where y does not surely grow with
        x: there is no cost to compare.

    Raises
    ------
    DataError
        As `linear_fit`, and below 3 different x.

    Examples
    --------
    >>> x = np.arange(1.0, 9)
    >>> f"{marginal_change(x, 50 + 3 * x):.2f}", f"{marginal_change(x, 50 + x**2):.2f}"
    ('0.00 [0.00, 0.00]', '1.56 [1.56, 1.56]')
    """
    x, y = as_pairs(("x", "y"), x, y)
    weight = relative_weights(x, y)
    design = weight[:, None] * np.column_stack([np.ones(x.size), x, x**2])
    solution = _solve(design, weight * y, ("intercept", "x", "x²"), clusters, level)
    change = np.array([0.0, 0.0, 2 * (x.max() - x.min())])
    mean = np.array([0.0, 1.0, x.max() + x.min()])
    cost = solution.estimate(float(mean @ solution.beta), mean)
    if cost.value is None or cost.value <= 0 or not (cost.low is None or cost.above(0)):
        note = "y does not surely grow with x: no cost of one more to compare"
        return Estimate(None, None, None, level, x.size, "none", note)
    value = float(change @ solution.beta) / cost.value
    return solution.estimate(value, (change - value * mean) / cost.value)


def relative_weights(x: Floats, y: Floats) -> Floats:
    """Return 1 / the straight line at each x, at most 10 / mean |y|."""
    design = _with_ones(x / max(float(np.abs(x).max()), 1e-300))
    line = np.abs(design @ np.linalg.lstsq(design, y, rcond=None)[0])
    return np.asarray(1 / np.maximum(line, max(float(np.abs(y).mean()) / 10, 1e-300)))


def power_law_fit(
    x: ArrayLike, y: ArrayLike, clusters: ArrayLike | None = None, *, level: float = 0.95
) -> PowerLawFit:
    """Fit y = scale·x^exponent: a straight line through log y over log x.

    Parameters
    ----------
    x, y : array_like, shape (n,)
        All above zero.
    clusters : array_like, shape (n,), optional
        The image of each point.

    Notes
    -----
    A fixed cost c beside a linear one, y = c + b·x, gives an exponent below 1 although every
    further token costs the same. To ask about the part that depends on tokens, subtract the
    intercept of `linear_fit`, or fit a component that has no fixed cost. Least squares on the
    logarithm weights all points by their relative error, which is how latencies scatter.

    Raises
    ------
    DataError
        For values that are not above zero, and as `linear_fit`.

    Examples
    --------
    >>> fit = power_law_fit([1, 2, 4, 8], [3.0, 6.0, 12.0, 24.0])
    >>> round(fit.exponent.value, 9), round(fit.scale.value, 9)
    (1.0, 3.0)
    """
    x, y = as_pairs(("x", "y"), x, y, positive=True)
    line = linear_fit(np.log(x), np.log(y), clusters, level=level)
    log = line.intercept
    return PowerLawFit(
        line.slope,
        Estimate(
            _exp(log.value), _exp(log.low), _exp(log.high), level, x.size, log.method, log.note
        ),
        line.r_squared,
        x.size,
        f"log-log {line.method}",
    )


@dataclass(frozen=True)
class Solution:
    """Coefficients of a least-squares fit with their covariance (None where n is too small)."""

    beta: Floats
    covariance: Floats | None
    freedom: int
    leverage: tuple[Floats, Floats] | None
    r_squared: float | None
    n: int
    method: str
    level: float

    def predict(self, design: Floats) -> Floats:
        """Return the fit at each row of `design`."""
        return np.asarray(design @ self.beta)

    def band(self, design: Floats) -> tuple[Floats, Floats]:
        """Return the limits of the fit at each row of `design`; NaN without covariance."""
        value = self.predict(design)
        if self.covariance is None:
            return np.full_like(value, np.nan), np.full_like(value, np.nan)
        variance = np.einsum("ij,jk,ik->i", design, self.covariance, design)
        half = np.array([self.t(row) for row in design]) * np.sqrt(variance.clip(0))
        return value - half, value + half

    def coefficients(self) -> list[Estimate]:
        """Return every coefficient with its interval."""
        return [
            self.estimate(float(value), unit)
            for value, unit in zip(self.beta, np.eye(self.beta.size), strict=True)
        ]

    def estimate(self, value: float, gradient: Floats) -> Estimate:
        """Return `value` with the interval of a function of the coefficients."""
        if self.covariance is None:
            note = f"an interval needs more than {self.beta.size} independent points"
            if self.freedom > 0:
                note = "no interval: one cluster alone fixes a coefficient"
            return Estimate(value, None, None, self.level, self.n, "none", note)
        variance = float(gradient @ self.covariance @ gradient)
        half = self.t(gradient) * math.sqrt(max(variance, 0.0))
        note = "" if half else "every point lies on the fit"
        return Estimate(value, value - half, value + half, self.level, self.n, self.method, note)

    def t(self, gradient: Floats) -> float:
        """Return Student's quantile for a function of the coefficients.

        Where few of the clusters tell a coefficient, clusters − k degrees of freedom are too many
        for CR3 (92 % in place of 95), and Satterthwaite's (Bell and McCaffrey 2002), made for the
        shorter CR2, too few (99.9 %): their geometric mean holds.
        """
        freedom = float(self.freedom)
        if self.leverage is not None:
            products, root = self.leverage
            left_out = np.eye(len(root)) - products
            weights = np.linalg.solve(
                left_out, np.broadcast_to(root.T @ gradient, products.shape[:2])[..., None]
            )
            moved = (products @ weights)[..., 0]
            own, drawn = (weights[..., 0] * moved).sum(axis=1), (moved**2).sum(axis=1)
            cross = moved.T @ moved
            squares = (own**2).sum() - 2 * (own * drawn).sum() + (cross**2).sum()
            if squares > 0:
                freedom = math.sqrt(freedom * max(1.0, float((own - drawn).sum() ** 2 / squares)))
        return student(self.level, freedom)


def _exp(x: float | None) -> float | None:
    return None if x is None else math.exp(x)


def _with_ones(x: Floats) -> Floats:
    return np.column_stack([np.ones(len(x)), x])


def _solve(
    design: Floats, y: Floats, names: Sequence[str], clusters: ArrayLike | None, level: float
) -> Solution:
    n, k = design.shape
    codes = as_codes(clusters, n)
    groups = int(codes.max()) + 1
    scale = np.abs(design).max(axis=0)
    scale[scale == 0] = 1
    Z = design / scale  # columns of 1 and of 10¹² FLOPs solve alike
    if n < k or np.linalg.matrix_rank(Z) < k:
        raise DataError(
            f"{n} points do not determine {', '.join(names)}: vary each on its own (at least "
            f"{k} different points)"
        )
    inverse = np.linalg.inv(Z.T @ Z)
    beta = np.linalg.lstsq(Z, y, rcond=None)[0]
    residual, largest = y - Z @ beta, float(np.abs(y).max())
    residual[np.abs(residual) <= EXACT * largest] = 0
    beta[np.abs(beta) <= EXACT * largest] = 0
    spread = ((y - y.mean()) ** 2).sum()
    flat = spread <= (EXACT * largest) ** 2 * n
    covariance, method, leverage = None, "least squares", None
    if groups > k:
        covariance, method, leverage = _covariance(Z, residual, inverse, codes, groups)
    if covariance is not None:
        covariance = covariance / scale[:, None] / scale  # the product may overflow
    if leverage is not None:
        leverage = leverage[0], leverage[1] / scale[:, None]
    return Solution(
        beta=beta / scale,
        covariance=covariance,
        freedom=groups - k,
        leverage=leverage,
        r_squared=None if flat else float(1 - (residual**2).sum() / spread),
        n=n,
        method=method,
        level=level,
    )


def _covariance(
    Z: Floats, residual: Floats, inverse: Floats, codes: NDArray[np.int64], groups: int
) -> tuple[Floats | None, str, tuple[Floats, Floats] | None]:
    """Return the covariance, its name, and what Satterthwaite's degrees of freedom need.

    The covariance is None where one cluster alone fixes a coefficient.
    """
    n, k = Z.shape
    if groups < n:
        # Leaving out a cluster needs only its k × k products, whatever the number of its rows.
        root = np.linalg.cholesky(inverse)
        own = Z @ root
        products = np.column_stack(
            [np.bincount(codes, weights=own[:, i] * own[:, j]) for i in range(k) for j in range(k)]
        ).reshape(groups, k, k)
        scores = np.column_stack(
            [np.bincount(codes, weights=own[:, i] * residual) for i in range(k)]
        )
        left_out = np.eye(k) - products
        if np.linalg.eigvalsh(left_out).min() < 1e-9:
            return None, "none", None
        scores = np.linalg.solve(left_out, scores[..., None])[..., 0] @ root.T
        method = f"least squares, CR3 over {groups} clusters"
        return np.asarray(scores.T @ scores), method, (np.asarray(products), np.asarray(root))
    free = 1 - np.einsum("ij,jk,ik->i", Z, inverse, Z)
    if free.min() < 1e-9:  # a point that alone fixes a coefficient has no residual to judge by
        equal = (residual**2).sum() / (n - k) * inverse
        return equal, "least squares, equal noise (one point fixes a coefficient)", None
    scores = Z * (residual / free)[:, None]
    return inverse @ (scores.T @ scores) @ inverse, "least squares, HC3", None
