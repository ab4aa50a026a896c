import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from vlm_latency.errors import UserError
from vlm_latency.statistics import correlations, iso_pairs, rank_inversions

SMALL = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=2, max_size=14)


@given(SMALL)
def test_inversions_are_those_of_all_pairs(points: list[tuple[int, int]]) -> None:
    signs = [(a[0] - b[0]) * (a[1] - b[1]) for a, b in itertools.combinations(points, 2)]
    untied = [sign for sign in signs if sign]
    found = rank_inversions(*np.array(points, float).T, resamples=5)
    if untied:
        assert found.value == pytest.approx(sum(sign < 0 for sign in untied) / len(untied))
    else:
        assert found.value is None


def test_inversions_have_intervals_by_image() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=30)
    y = x + rng.normal(size=30)
    alone = rank_inversions(x, y)
    assert alone.low < alone.value < alone.high
    doubled = rank_inversions(np.repeat(x, 2), np.repeat(y, 2), np.repeat(np.arange(30), 2))
    assert doubled.value == pytest.approx(alone.value)
    assert (doubled.low, doubled.high) == pytest.approx((alone.low, alone.high))


@given(SMALL, st.sampled_from([0.02, 0.5]))
def test_iso_pairs_are_those_of_all_pairs(points: list[tuple[int, int]], tol: float) -> None:
    ratios = [
        max(a[1], b[1]) / min(a[1], b[1])
        for a, b in itertools.combinations(points, 2)
        if max(a[0], b[0]) <= min(a[0], b[0]) * (1 + tol)
    ]
    x, y = np.array(points, float).T
    found = iso_pairs(x, y, tol)
    assert found.n_pairs == len(ratios)
    if ratios:
        assert found.max_ratio == pytest.approx(max(ratios))
        assert found.median_ratio.value == pytest.approx(np.median(ratios))
        fast, slow = found.max_pair
        assert y[slow] / y[fast] == pytest.approx(found.max_ratio)


def test_the_median_of_iso_pairs_has_an_interval_over_points() -> None:
    y = np.random.default_rng(0).uniform(1, 3, size=40)
    found = iso_pairs(np.ones(40), y).median_ratio
    assert 1 < found.low < found.value < found.high < 3
    # 780 pairs of 40 points are not 780 observations
    assert found.high - found.low > 0.1
    assert "20 pairs that share no point" in found.method
    assert iso_pairs(np.ones(11), y[:11]).median_ratio.low is None
    assert iso_pairs([1, 2], [1, 2]).median_ratio.value is None


def test_iso_pairs_wants_latencies() -> None:
    with pytest.raises(UserError, match="at or below zero"):
        iso_pairs([0.0, 1.0], [1.0, 1.0])


def test_correlations_agree_with_scipy() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=50)
    y = x + rng.normal(size=50)
    found = correlations(x, y)
    assert found.pearson.value == pytest.approx(scipy.stats.pearsonr(x, y).statistic)
    assert found.pearson.low is None and "chosen" in found.pearson.note
    assert found.spearman.value == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert found.r_squared == pytest.approx(scipy.stats.linregress(x, y).rvalue ** 2)


def test_constant_and_short_columns() -> None:
    assert correlations([1, 2, 3, 4], [5, 5, 5, 5]).pearson.value is None
    assert correlations([1, 2, 3, 4], [2, 4, 6, 8]).pearson.value == pytest.approx(1)
