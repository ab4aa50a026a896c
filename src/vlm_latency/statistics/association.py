"""How far FLOPs determine latency: correlation, order, and spread at equal FLOPs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from vlm_latency.errors import DataError
from vlm_latency.statistics.quantiles import needed_n, percentile
from vlm_latency.statistics.results import (
    ROUNDING,
    Estimate,
    Floats,
    Result,
    as_codes,
    as_pairs,
)


@dataclass(frozen=True)
class Correlations(Result):
    """Pearson's r, Spearman's rho, and R² of the straight line (r²); see `correlations`."""

    pearson: Estimate
    spearman: Estimate
    r_squared: float | None
    n: int


def correlations(x: ArrayLike, y: ArrayLike, *, level: float = 0.95) -> Correlations:
    """Correlate two columns.

    Without intervals: the x of a sweep are chosen, not drawn, and Fisher's z, made for normal
    pairs, holds 67 to 82 % in place of 95 on lognormal ones. For what another sweep would give
    there are slopes, held-out errors and `rank_inversions`. None where a column is constant.

    Raises
    ------
    DataError
        For NaN or infinity, or unequal lengths.

    Examples
    --------
    >>> found = correlations([1, 2, 3, 4, 5, 6], [1, 4, 9, 16, 25, 36])
    >>> f"{found.pearson:.3f}", found.spearman.value
    ('0.979 (no interval)', 1.0)
    """
    x, y = as_pairs(("x", "y"), x, y)

    def given(value: float | None, note: str) -> Estimate:
        return Estimate(value, None, None, level, x.size, "none", note)

    if min(_spread(x), _spread(y)) <= ROUNDING:
        none = given(None, "a column is constant")
        return Correlations(none, none, None, x.size)
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))
    rho = float(np.clip(scipy.stats.spearmanr(x, y).statistic, -1, 1))
    note = "no interval: the x of a sweep are chosen, not drawn from normal pairs"
    return Correlations(given(r, note), given(rho, note), r**2, x.size)


def rank_inversions(
    x: ArrayLike,
    y: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    level: float = 0.95,
    resamples: int = 300,
    seed: int = 0,
) -> Estimate:
    """Share of pairs that `x` orders the other way round than `y` (Kendall's discordant pairs).

    Pairs tied in either column are left out; for pairs of equal x see `iso_pairs`.

    Returns
    -------
    Estimate
        0 for the same order, 1 for the reverse, about 0.5 for none. The interval is a percentile
        bootstrap over points, or over `clusters`. None when every pair is tied.

    Raises
    ------
    DataError
        For NaN or infinity, or unequal lengths.

    Examples
    --------
    >>> rank_inversions([1, 2, 3, 4], [10, 30, 20, 40]).value
    0.16666666666666666
    """
    x, y = as_pairs(("x", "y"), x, y)
    value = _discordant(x, y)
    if value is None:
        return Estimate(None, None, None, level, x.size, "none", "every pair is tied")
    codes = as_codes(clusters, x.size)
    members = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        drawn = rng.integers(len(members), size=len(members))
        rows = drawn if clusters is None else np.concatenate([members[i] for i in drawn])
        if (share := _discordant(x[rows], y[rows])) is not None:
            draws.append(share)
    if len(members) < 3 or not draws:
        note = f"an interval needs at least 3 independent points, found {len(members)}"
        return Estimate(value, None, None, level, x.size, "none", note)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high), level, x.size, "percentile bootstrap")


@dataclass(frozen=True)
class IsoPairs(Result):
    """Pairs of equal x and what their y differ by; see `iso_pairs`."""

    n_pairs: int
    median_ratio: Estimate
    max_ratio: float | None
    max_pair: tuple[int, int] | None
    tolerance: float
    n: int


def iso_pairs(
    x: ArrayLike,
    y: ArrayLike,
    tolerance: float = 0.02,
    *,
    level: float = 0.95,
) -> IsoPairs:
    """Find pairs of (nearly) equal `x`, such as FLOPs, and how far apart their `y` are.

    Parameters
    ----------
    x, y : array_like, shape (n,)
        All above zero. Give the mean of each shape, not every run: two runs of one shape would
        count as a pair.
    tolerance : float
        Pairs with max(x) / min(x) ≤ 1 + tolerance.

    Returns
    -------
    IsoPairs
        Ratios are of the larger y to the smaller, so at least 1; `max_pair` holds the positions
        of the most distant pair, the slower one second. Pairs that share a point are not
        independent, so the interval of the median is that of order statistics over pairs that
        share none, taken along x; it needs six of them.

    Raises
    ------
    DataError
        For values that are not above zero, or more than 20 million pairs.

    Examples
    --------
    >>> found = iso_pairs([100, 101, 200, 300], [10.0, 15.0, 20.0, 30.0])
    >>> found.n_pairs, found.median_ratio.value, found.max_pair
    (1, 1.5, (0, 1))
    """
    x, y = as_pairs(("x", "y"), x, y, positive=True)
    order = np.argsort(x, kind="stable")
    ends = np.searchsorted(x[order], x[order] * (1 + tolerance), side="right")
    partners = ends - np.arange(x.size) - 1
    total = int(partners.sum())
    if total > 20_000_000:
        raise DataError(
            f"{total} pairs of equal x; expected shapes: average the runs of each first"
        )
    if not total:
        none = Estimate(None, None, None, level, x.size, "none", "no two points have equal x")
        return IsoPairs(0, none, None, None, tolerance, x.size)
    first = np.repeat(np.arange(x.size), partners)
    second = first + 1 + np.arange(total) - np.repeat(np.cumsum(partners) - partners, partners)
    ratios = y[order][second] / y[order][first]
    size = np.maximum(ratios, 1 / ratios)
    widest = int(size.argmax())
    pair = (int(order[first[widest]]), int(order[second[widest]]))
    return IsoPairs(
        total,
        _median(size, first, second, x.size, level),
        float(size[widest]),
        pair if ratios[widest] >= 1 else pair[::-1],
        tolerance,
        x.size,
    )


def _median(
    values: Floats, first: NDArray[np.intp], second: NDArray[np.intp], n: int, level: float
) -> Estimate:
    """Median of all pairs, with the interval of those that share no point."""
    used: set[int] = set()
    own = []
    for pair in np.lexsort((second - first, first)):  # the nearest partner of each point first
        ends = {int(first[pair]), int(second[pair])}
        if not ends & used:
            used |= ends
            own.append(pair)
    value = float(np.median(values))
    alone = percentile(values[own], 50, level)
    if alone.low is None or alone.high is None:
        note = (
            f"an interval needs {needed_n(50, level)} pairs that share no point, found {len(own)}"
        )
        return Estimate(value, None, None, level, n, "none", note)
    method = f"order statistics of {len(own)} pairs that share no point"
    return Estimate(value, min(value, alone.low), max(value, alone.high), level, n, method)


def _spread(values: Floats) -> float:
    return float(np.ptp(values) / max(np.abs(values).max(), 1e-300))


def _discordant(x: Floats, y: Floats) -> float | None:
    def tied(values: NDArray[np.generic]) -> int:
        counts = np.unique(values, return_counts=True)[1]
        return int((counts * (counts - 1) // 2).sum())

    pairs = x.size * (x.size - 1) // 2
    x_rank, y_rank = (np.unique(column, return_inverse=True)[1] for column in (x, y))
    in_x, in_y = tied(x_rank), tied(y_rank)
    untied = pairs - in_x - in_y + tied(x_rank * y.size + y_rank)
    if untied == 0:
        return None
    tau = scipy.stats.kendalltau(
        x_rank, y_rank
    ).statistic  # tau-b: (P − Q) / √((all − in_x)(all − in_y))
    surplus = round(float(tau * np.sqrt(float(pairs - in_x) * float(pairs - in_y))))
    return (untied - surplus) / 2 / untied
