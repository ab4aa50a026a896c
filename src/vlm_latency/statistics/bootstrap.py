"""Means and ratios of means with intervals, by bootstrap over images."""

from __future__ import annotations

import warnings

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from vlm_latency.statistics.results import ROUNDING, Estimate, Floats, as_codes, as_pairs, as_values

# Below 20 clusters the bootstrap's intervals are too short (12-17 % false alarms at 5-10 pairs);
# above 5,000 the jackknife of BCa costs n² and the t interval agrees with it to three digits.
BOOTSTRAP_CLUSTERS = (20, 5_000)


def bootstrap_mean(
    values: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> Estimate:
    """Mean with its interval; `bootstrap_ratio` over a count of one per value.

    Examples
    --------
    >>> e = bootstrap_mean(np.arange(100.0))
    >>> f"{e:.1f}", e.method
    ('49.5 (43.9 to 55.0)', 'BCa bootstrap')
    >>> print(bootstrap_mean([7.0, 7.0, 7.0]))
    7 (7 to 7); nothing varies among the 3 values
    """
    values = as_values("values", values)
    return bootstrap_ratio(
        values, np.ones_like(values), clusters, level=level, resamples=resamples, seed=seed
    )


def bootstrap_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> Estimate:
    """Ratio of two means over the same observations, such as the share of a component in T_total.

    Parameters
    ----------
    numerator, denominator : array_like, shape (n,)
    clusters : array_like, shape (n,), optional
        The image of each observation: whole images are drawn. Without it, observations are.
    level : float
        Confidence level.
    resamples, seed : int
        Of the bootstrap; the same seed gives the same interval.

    Returns
    -------
    Estimate
        With 20 to 5,000 clusters by `scipy.stats.bootstrap` (BCa) on sums per cluster. With fewer
        or more by Student's t on the linearised ratio (delta method), and `method` says so.
        Without variation the interval is the value itself. One cluster gives no interval.

    Raises
    ------
    DataError
        For NaN, infinity, no values, or unequal lengths.

    Examples
    --------
    >>> print(bootstrap_ratio([2.0, 4.0, 6.0], [4.0, 8.0, 12.0]))
    0.5 (0.5 to 0.5); nothing varies among the 3 values
    """
    a, b = as_pairs(("numerator", "denominator"), numerator, denominator)
    codes = as_codes(clusters, a.size)
    sums = (a, b) if clusters is None else (_sums(a, codes), _sums(b, codes))
    unit = "values" if clusters is None else "clusters"
    if b.sum() == 0:
        return Estimate(None, None, None, level, a.size, "none", "the denominator is zero")
    value, error, groups = linearised(a, b, codes)
    if groups < 2:
        note = f"an interval needs at least 2 independent {unit}, found {groups}"
        return Estimate(value, None, None, level, a.size, "none", note)
    if error == 0:
        note = f"nothing varies among the {groups} {unit}"
        return Estimate(value, value, value, level, a.size, "no variation", note)
    of_images = "" if clusters is None else f" over {groups} clusters"
    if BOOTSTRAP_CLUSTERS[0] <= groups <= BOOTSTRAP_CLUSTERS[1]:
        low, high = _bca(sums, level, resamples, seed)
        if np.isfinite(low) and np.isfinite(high):
            return Estimate(value, low, high, level, a.size, "BCa bootstrap" + of_images)
    half = scipy.stats.t.ppf((1 + level) / 2, groups - 1) * error
    return Estimate(
        value, float(value - half), float(value + half), level, a.size, "t, linearised" + of_images
    )


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


def _sums(values: Floats, codes: NDArray[np.int64]) -> Floats:
    return np.bincount(codes, weights=values).astype(float)


def _bca(sums: tuple[Floats, Floats], level: float, resamples: int, seed: int) -> tuple[float, ...]:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # degenerate resamples: the caller checks what comes out
        interval = scipy.stats.bootstrap(
            sums,
            lambda a, b, axis: a.sum(axis) / b.sum(axis),
            paired=True,
            vectorized=True,
            confidence_level=level,
            n_resamples=resamples,
            batch=max(1, 1_000_000 // sums[0].size),
            method="BCa",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return float(interval.low), float(interval.high)
