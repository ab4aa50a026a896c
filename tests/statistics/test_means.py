import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from vlm_latency.errors import UserError
from vlm_latency.statistics import mean_estimate, ratio_estimate


def test_without_skewness_it_is_students_t_by_hand() -> None:
    # mean 2, s = 1, standard error 1/√3, t(0.975, 2) = 4.302653
    found = mean_estimate([1.0, 2.0, 3.0])
    assert found.value == 2.0
    assert (found.low, found.high) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-6)
    assert found.method == "t, corrected for skewness"


def test_halls_transformation_by_hand() -> None:
    values = np.array([1.0, 1, 1, 2, 2, 3, 4, 10])
    found = mean_estimate(values)
    n, skewness = 8, scipy.stats.skew(values)
    error = values.std(ddof=1) / np.sqrt(n)

    def g(mu: float) -> float:
        T, a = (3 - mu) / error / np.sqrt(n), skewness / 3
        return np.sqrt(n) * (T + a * T**2 + a**2 / 3 * T**3 + skewness / (6 * n))

    t = scipy.stats.t.ppf(0.975, n - 1)
    assert (g(found.low), g(found.high)) == pytest.approx((t, -t))
    assert found.high - 3 > 3 - found.low


def test_a_ratio_of_means_is_not_a_mean_of_ratios() -> None:
    assert ratio_estimate([1.0, 9.0], [2.0, 10.0]).value == pytest.approx(10 / 12)


def test_jackknife_of_a_ratio_by_hand() -> None:
    a, b = np.array([1.0, 2, 4, 3]), np.array([2.0, 5, 6, 7])
    found = ratio_estimate(a, b)
    logs = [np.log(np.delete(a, i).sum() / np.delete(b, i).sum()) - np.log(0.5) for i in range(4)]
    half = scipy.stats.t.ppf(0.975, 3) * np.sqrt(3 / 4 * np.square(logs).sum())
    assert (found.low, found.high) == pytest.approx((0.5 * np.exp(-half), 0.5 * np.exp(half)))
    signed = ratio_estimate(a - 4, b)
    assert signed.method == "t, jackknife"
    assert signed.low < -0.3 < signed.high


@given(st.lists(st.floats(1, 100), min_size=2, max_size=30), st.integers(2, 4))
def test_copies_within_an_image_add_no_certainty(values: list[float], copies: int) -> None:
    alone = mean_estimate(values)
    labels = np.repeat(np.arange(len(values)), copies)
    together = mean_estimate(np.repeat(values, copies), labels)
    assert together.low == pytest.approx(alone.low, rel=1e-6)
    assert together.high == pytest.approx(alone.high, rel=1e-6)


def test_without_variation_the_interval_is_the_value() -> None:
    found = mean_estimate([0.1] * 30)
    assert found.low == found.high == found.value == pytest.approx(0.1)
    assert found.note == "nothing varies among the 30 values"
    share = ratio_estimate(0.3 * np.arange(1, 50), np.arange(1, 50))
    assert share.low == share.high == pytest.approx(0.3)


def test_one_cluster_has_no_interval() -> None:
    found = mean_estimate([1.0, 2.0, 4.0], ["a", "a", "a"])
    assert (found.low, found.high) == (None, None)
    assert "at least 2 independent clusters, found 1" in found.note


def test_one_value_that_carries_the_variance_is_told() -> None:
    values = np.append(np.arange(20.0), 400)
    assert "one of the 21 values makes 9" in mean_estimate(values).note
    assert not mean_estimate(values[:-1]).note


def test_zero_denominators() -> None:
    assert ratio_estimate([1.0, 2.0], [0.0, 0.0]).value is None
    sparse = np.zeros(30)
    sparse[0] = 1.0
    fallback = ratio_estimate(np.ones(30), sparse)  # the jackknife divides by zero once
    assert fallback.method == "t, linearised"
    assert fallback.low < fallback.value < fallback.high


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(UserError, match="numerator has 2 values and denominator 3"):
        ratio_estimate([1, 2], [1, 2, 3])
