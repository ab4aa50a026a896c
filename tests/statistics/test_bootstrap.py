import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from vlm_latency.errors import UserError
from vlm_latency.statistics import bootstrap_mean, bootstrap_ratio


def test_t_interval_of_few_values_by_hand() -> None:
    # mean 2, s = 1, standard error 1/√3, t(0.975, 2) = 4.302653
    found = bootstrap_mean([1.0, 2.0, 3.0])
    assert found.value == 2.0
    assert (found.low, found.high) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-6)
    assert found.method == "t, linearised"


def test_agrees_with_scipy_on_raw_values() -> None:
    values = np.random.default_rng(3).lognormal(size=60)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=2_000, rng=np.random.default_rng(0)
    ).confidence_interval
    found = bootstrap_mean(values)
    assert found.method == "BCa bootstrap"
    assert (found.low, found.high) == pytest.approx(tuple(expected), rel=1e-9)


def test_a_ratio_of_means_is_not_a_mean_of_ratios() -> None:
    assert bootstrap_ratio([1.0, 9.0], [2.0, 10.0]).value == pytest.approx(10 / 12)


@given(st.lists(st.floats(1, 100), min_size=2, max_size=30), st.integers(2, 4))
def test_copies_within_an_image_add_no_certainty(values: list[float], copies: int) -> None:
    alone = bootstrap_mean(values, resamples=200)
    labels = np.repeat(np.arange(len(values)), copies)
    together = bootstrap_mean(np.repeat(values, copies), labels, resamples=200)
    assert together.low == pytest.approx(alone.low, rel=1e-6)
    assert together.high == pytest.approx(alone.high, rel=1e-6)


@pytest.mark.parametrize("images", [10, 40])
def test_coverage_by_images(images: int) -> None:
    rng = np.random.default_rng(images)
    hits = 0
    for _ in range(300):
        labels = np.repeat(np.arange(images), 5)
        values = 10 + rng.normal(size=images)[labels] + 0.3 * rng.normal(size=labels.size)
        found = bootstrap_mean(values, labels, resamples=500)
        hits += found.low <= 10 <= found.high
    assert 0.91 <= hits / 300 <= 0.985


def test_large_tables_take_the_t_interval() -> None:
    rng = np.random.default_rng(4)
    values, labels = rng.lognormal(size=214_354), np.arange(214_354) // 5
    found = bootstrap_mean(values, labels)
    assert found.method == "t, linearised over 42871 clusters"
    by_hand = 1.96 * np.std(np.bincount(labels, weights=values - found.value)) * np.sqrt(42_871)
    assert found.high - found.value == pytest.approx(by_hand / 214_354, rel=1e-3)


def test_without_variation_the_interval_is_the_value() -> None:
    found = bootstrap_mean([0.1] * 30)
    assert found.low == found.high == found.value == pytest.approx(0.1)
    assert found.note == "nothing varies among the 30 values"
    share = bootstrap_ratio(0.3 * np.arange(1, 50), np.arange(1, 50))
    assert share.low == share.high == pytest.approx(0.3)


def test_one_cluster_has_no_interval() -> None:
    found = bootstrap_mean([1.0, 2.0, 4.0], ["a", "a", "a"])
    assert (found.low, found.high) == (None, None)
    assert "at least 2 independent clusters, found 1" in found.note


def test_zero_denominators() -> None:
    assert bootstrap_ratio([1.0, 2.0], [0.0, 0.0]).value is None
    sparse = np.zeros(30)
    sparse[0] = 1.0
    fallback = bootstrap_ratio(np.ones(30), sparse)  # a resample without it divides by zero
    assert fallback.method == "t, linearised"
    assert fallback.low < fallback.value < fallback.high


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(5).lognormal(size=100)
    assert bootstrap_mean(values, seed=7) == bootstrap_mean(values, seed=7)
    assert bootstrap_mean(values, seed=7) != bootstrap_mean(values, seed=8)


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(UserError, match="numerator has 2 values and denominator 3"):
        bootstrap_ratio([1, 2], [1, 2, 3])
