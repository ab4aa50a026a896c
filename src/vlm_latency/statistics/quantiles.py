"""Percentiles with distribution-free intervals, and how many observations these need."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from vlm_latency.errors import UserError
from vlm_latency.statistics.means import linearised, mean_estimate
from vlm_latency.statistics.results import (
    ROUNDING,
    Estimate,
    Floats,
    Result,
    as_codes,
    as_values,
    student,
)

# Fewer clusters than the median's bounds need say nothing of their own spread.
FEW_CLUSTERS = 6


def needed_n(q: float, level: float = 0.95) -> int:
    """Count the observations from which on both ends of percentile `q`'s interval are bounded.

    The largest of n observations bounds the percentile from above at a risk of (q / 100)ⁿ, the
    smallest from below at (1 − q / 100)ⁿ; each must be at most (1 − level) / 2.

    >>> needed_n(99), needed_n(95), needed_n(50)
    (368, 72, 6)
    """
    p = _probability(q)
    return math.ceil(math.log((1 - level) / 2) / math.log(max(p, 1 - p)))


def percentile(
    values: ArrayLike, q: float, level: float = 0.95, clusters: ArrayLike | None = None
) -> Estimate:
    """Estimate percentile `q` with the distribution-free interval of order statistics.

    Parameters
    ----------
    values : array_like, shape (n,)
    q : float
        In percent, between 0 and 100: 99 for P99.
    level : float
        Confidence level; what `scipy.stats.quantile_test` gives, at least this much.
    clusters : array_like, shape (n,), optional
        The image of each value. Values of one image are alike, so n is divided by the design
        effect of the clusters, the larger of that at this percentile and at the median, and for
        few clusters by Student's quantile (Woodruff 1952; Korn and Graubard 1998) before ranks
        are chosen. Below six clusters no design effect is known: each counts as one value.

    Returns
    -------
    Estimate
        The value interpolates linearly, as `numpy.percentile`. An end that is unbounded at this n
        is None, and `note` says how many values it needs.

    Raises
    ------
    UserError
        When `q` is not between 0 and 100, or `values` are empty or hold NaN or infinity.

    Examples
    --------
    >>> e = percentile(np.arange(1.0, 201.0), 99)
    >>> e.low, e.high, e.note
    (195.0, None, 'the upper bound of P99 needs n >= 368 (found 200)')
    >>> f"{percentile(np.arange(1.0, 201.0), 50):.1f}"
    '100.5 [86.0, 115.0]'
    """
    p = _probability(q)
    ordered = np.sort(as_values("values", values))
    n = ordered.size
    value = float(np.quantile(ordered, p))
    effective = n
    method, found = "order statistics", f"found {n}"
    if clusters is not None:
        effective = _effective_n(np.asarray(values, float), p, as_codes(clusters, n), level)
        method += f", effective n of {effective} by clusters"
        found = f"found {n}, worth {effective}"
    tail = (1 - level) / 2
    below, above = _binomial_ends(effective, p, tail)  # ranks, counted from 1
    above += 1
    low = high = None  # the ends never leave out the value, which interpolates between ranks
    if below >= 1:
        share = below / effective
        if share > p:  # the largest of few: too coarse a rank to be carried over to many
            share = scipy.special.betaincinv(effective * p, effective * (1 - p) + 1, tail)
        low = min(value, float(ordered[math.ceil(share * n - 1e-9) - 1]))
    if above <= effective:
        high = max(value, float(ordered[math.ceil(above * n / effective) - 1]))
    missing = [
        f"the {end} bound of P{q:g} needs n >= {math.ceil(math.log(tail) / math.log(risk))}"
        for end, bound, risk in (("lower", low, 1 - p), ("upper", high, p))
        if bound is None
    ]
    note = f"{' and '.join(missing)} ({found})" if missing else ""
    return Estimate(value, low, high, level, n, method, note)


def _binomial_ends(n: int, p: float, tail: float) -> tuple[int, int]:
    """Give the least counts up to which, and beyond which, at least, at most, a share `tail` lies."""
    far = 10 + 10 * math.sqrt(n * p * (1 - p))
    counts = np.arange(max(0, int(n * p - far)), min(n, int(n * p + far)) + 1)
    upto = np.searchsorted(scipy.special.bdtr(counts, n, p), tail)
    beyond = np.argmax(scipy.special.bdtrc(counts, n, p) <= tail)
    return int(counts[upto]), int(counts[beyond])


def tail_ratio(
    values: ArrayLike, level: float = 0.95, clusters: ArrayLike | None = None
) -> Estimate:
    """Estimate P99 / P50 with a distribution-free interval.

    Two intervals, each at half the risk (Bonferroni), are divided end by end, so the interval
    holds at least at `level`; its upper end needs 437 values at 95 %.

    Raises
    ------
    UserError
        As `percentile`, and when a value is not above zero.

    Examples
    --------
    >>> print(tail_ratio([5.0] * 10))
    1 [1, 1]; nothing varies among the 10 values
    """
    values = as_values("values", values, positive=True)
    if values.size > 1 and np.ptp(values) <= ROUNDING * values.max():
        note = f"nothing varies among the {values.size} values"
        return Estimate(1.0, 1.0, 1.0, level, values.size, "no variation", note)
    each = (1 + level) / 2
    p50, p99 = (percentile(values, q, each, clusters) for q in (50, 99))
    assert p50.value and p99.value  # both positive
    return Estimate(
        p99.value / p50.value,
        p99.low / p50.high if p99.low and p50.high else None,
        p99.high / p50.low if p99.high and p50.low else None,
        level,
        values.size,
        f"{p99.method}, Bonferroni",
        "; ".join(note for note in (p50.note, p99.note) if note),
    )


@dataclass(frozen=True)
class Summary(Result):
    """A distribution in ten numbers; see `summary`."""

    n: int
    n_clusters: int
    mean: Estimate
    std: float
    min: float
    max: float
    P50: Estimate
    P95: Estimate
    P99: Estimate
    tail_ratio: Estimate | None


def summary(values: ArrayLike, clusters: ArrayLike | None = None, level: float = 0.95) -> Summary:
    """Summarise a distribution of latencies.

    Parameters
    ----------
    values : array_like, shape (n,)
        In any unit; the results are in the same.
    clusters : array_like, shape (n,), optional
        The image of each value, where images repeat.

    Returns
    -------
    Summary
        `std` has the divisor n − 1 (NaN at n = 1). `tail_ratio` is None when a value is ≤ 0.

    Examples
    --------
    >>> s = summary([10.0, 12.0, 11.0, 30.0])
    >>> s.n, s.max, s.P50.value, s.P99.note
    (4, 30.0, 11.5, 'the upper bound of P99 needs n >= 368 (found 4)')
    """
    array = as_values("values", values)
    return Summary(
        n=array.size,
        n_clusters=int(as_codes(clusters, array.size).max()) + 1,
        mean=mean_estimate(array, clusters, level=level),
        std=float(array.std(ddof=1)) if array.size > 1 else math.nan,
        min=float(array.min()),
        max=float(array.max()),
        P50=percentile(array, 50, level, clusters),
        P95=percentile(array, 95, level, clusters),
        P99=percentile(array, 99, level, clusters),
        tail_ratio=tail_ratio(array, level, clusters) if (array > 0).all() else None,
    )


def _probability(q: float) -> float:
    if not 0 < q < 100:
        raise UserError(f"percentile {q:g} found; expected a number between 0 and 100, 99 for P99")
    return q / 100


def _effective_n(values: Floats, p: float, codes: NDArray[np.int64], level: float) -> int:
    """Return the effective sample size for the shares at or below the quantile p and the median.

    Few values in the tail know little of their design effect: the median's bounds it.
    """
    worth = []
    for at in (p, 0.5):
        at_most = (values <= np.quantile(values, at)).astype(float)
        share, error, groups = linearised(at_most, np.ones_like(at_most), codes)
        if groups < FEW_CLUSTERS:
            return groups
        # Where nothing varies: no more than one observation per cluster. error² of n
        # independent values is p(1 − p) / (n − 1).
        worth.append(1 + share * (1 - share) / error**2 if error else groups)
    least = max(min(values.size, *worth), 2)
    share = student(level, least - 1) / student(level, groups - 1)
    return max(1, int(least * min(1, share) ** 2 * (1 + 1e-9)))
