"""Means and ratios of means with intervals, over values or over images."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlm_latency.statistics.results import (
    ROUNDING,
    Estimate,
    Floats,
    as_codes,
    as_pairs,
    as_values,
    student,
)

# One value that makes more than half of the squared deviations (of fewer than 20 values: three
# quarters, which few normal samples reach) carries the interval by itself.
CARRIES, FEW = (0.75, 0.5), 20


def carried(squares: Floats) -> bool:
    """Say whether one of the squared deviations makes most of their sum; never of fewer than 5."""
    limit = CARRIES[squares.size >= FEW]
    return squares.size >= 5 and bool(squares.max() > limit * squares.sum())


def mean_estimate(
    values: ArrayLike, clusters: ArrayLike | None = None, *, level: float = 0.95
) -> Estimate:
    """Estimate a mean: Student's t, corrected for skewness by Hall's transformation.

    Parameters
    ----------
    values : array_like, shape (n,)
    clusters : array_like, shape (n,), optional
        The image of each value: images are the independent units.
    level : float
        Confidence level.

    Returns
    -------
    Estimate
        `note` warns where one value (or image) makes more than half of the variance (of fewer
        than 20: three quarters): of heavy tails and rare modes few values know nothing, and the
        interval may be too narrow. Without
        variation the interval is the value itself. One cluster gives no interval.

    Raises
    ------
    DataError
        For NaN, infinity or no values.

    Notes
    -----
    P. Hall, "On the removal of skewness by transformation", JRSS B 54 (1992): latencies are
    skewed, and Student's t alone is too short on the side of the tail.

    Examples
    --------
    >>> print(mean_estimate([9.0, 10.0, 11.0, 10.5, 9.5]))
    10 [9.018, 10.98]
    >>> print(mean_estimate([7.0, 7.0, 7.0]))
    7 [7, 7]; nothing varies among the 3 values
    """
    values = as_values("values", values)
    codes = as_codes(clusters, values.size)
    unit = "values" if clusters is None else "clusters"
    return _estimate(values, np.ones_like(values), codes, unit, level)


def ratio_estimate(
    numerator: ArrayLike,
    denominator: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    level: float = 0.95,
) -> Estimate:
    """Estimate a ratio of two means over the same observations, such as a share of T_total.

    Parameters
    ----------
    numerator, denominator : array_like, shape (n,)
    clusters : array_like, shape (n,), optional
        The image of each observation: images are the independent units.
    level : float
        Confidence level.

    Returns
    -------
    Estimate
        Student's t on the jackknife of the ratio's logarithm, or of the ratio itself where it is
        not above zero; `method` says which. `note` as in `mean_estimate`.

    Raises
    ------
    DataError
        For NaN, infinity, no values, or unequal lengths.

    Examples
    --------
    >>> print(ratio_estimate([2.0, 4.0, 6.0], [4.0, 8.0, 12.0]))
    0.5 [0.5, 0.5]; nothing varies among the 3 values
    """
    a, b = as_pairs(("numerator", "denominator"), numerator, denominator)
    codes = as_codes(clusters, a.size)
    unit = "values" if clusters is None else "clusters"
    if b.sum() == 0:
        return Estimate(None, None, None, level, a.size, "none", "the denominator is zero")
    return _estimate(a, b, codes, unit, level, of_means=True)


def linearised(a: Floats, b: Floats, codes: NDArray[np.int64]) -> tuple[float, float, int]:
    """Return sum(a) / sum(b), its standard error over clusters (delta method) and their number.

    The error is exactly 0 where nothing varies beyond rounding, and NaN with one cluster.
    """
    ratio = float(a.sum() / b.sum())
    residual = _sums(a - ratio * b, codes)
    groups = residual.size
    if groups < 2:
        return ratio, float("nan"), groups
    if np.abs(residual).max() <= ROUNDING * max(np.abs(a).max(), np.abs(ratio * b).max()) * (
        a.size / groups
    ):
        return ratio, 0.0, groups
    error = np.sqrt(groups / (groups - 1) * (residual**2).sum()) / abs(b.sum())
    return ratio, float(error), groups


def _estimate(
    a: Floats,
    b: Floats,
    codes: NDArray[np.int64],
    unit: str,
    level: float,
    *,
    of_means: bool = False,
) -> Estimate:
    value, error, groups = linearised(a, b, codes)
    if groups < 2:
        note = f"an interval needs at least 2 independent {unit}, found {groups}"
        return Estimate(value, None, None, level, a.size, "none", note)
    if error == 0:
        note = f"nothing varies among the {groups} {unit}"
        return Estimate(value, value, value, level, a.size, "no variation", note)
    t = student(level, groups - 1)
    deviation = _sums(a - value * b, codes)
    squares = deviation**2
    note = (
        f"one of the {groups} {unit} makes {squares.max() / squares.sum():.0%} of the variance: "
        "the interval may be too narrow"
        if carried(squares)
        else ""
    )
    over = f" over {groups} clusters" if unit == "clusters" else ""
    if not of_means:
        low, high = value - error * _unskewed(np.array([t, -t]), deviation)
        return Estimate(
            value, float(low), float(high), level, a.size, "t, corrected for skewness" + over, note
        )
    top, bottom = _sums(a, codes), _sums(b, codes)
    rest = bottom.sum() - bottom
    with np.errstate(divide="ignore", invalid="ignore"):
        without = (top.sum() - top) / rest
    jackknife = np.sqrt((groups - 1) / groups)
    if value > 0 and np.isfinite(without).all() and without.min() > 0:
        half = t * jackknife * np.sqrt(((np.log(without) - np.log(value)) ** 2).sum())
        low, high = value * np.exp([-half, half])
        method = "t on the logarithm, jackknife"
    else:
        if np.isfinite(without).all():
            error = jackknife * np.sqrt(((without - value) ** 2).sum())
        low, high = value - t * error, value + t * error
        method = "t, jackknife" if np.isfinite(without).all() else "t, linearised"
    return Estimate(value, float(low), float(high), level, a.size, method + over, note)


def _unskewed(t: Floats, deviation: Floats) -> Floats:
    """Invert Hall's g(T) = T + a·T² + a²·T³/3 + skewness/(6n), a = skewness/3, in units of T√n."""
    n = deviation.size
    centred = deviation - deviation.mean()
    skewness = float((centred**3).mean() / (centred**2).mean() ** 1.5)
    y = t / np.sqrt(n) - skewness / (6 * n)
    a = skewness / 3
    inverse = y if abs(a) < 1e-6 else (np.cbrt(1 + 3 * a * y) - 1) / a
    return np.asarray(inverse * np.sqrt(n))


def _sums(values: Floats, codes: NDArray[np.int64]) -> Floats:
    return np.bincount(codes, weights=values).astype(float)
