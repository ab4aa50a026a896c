import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from vlm_latency.errors import UserError
from vlm_latency.statistics import linear_fit, multi_linear_fit, power_law_fit

RNG = np.random.default_rng(0)


def test_line_and_hc3_by_hand() -> None:
    x, y = np.array([0.0, 1, 2, 3, 4]), np.array([1.0, 2, 2, 5, 5])
    fit = linear_fit(x, y)
    assert (fit.slope.value, fit.intercept.value) == pytest.approx((1.1, 0.8))
    assert fit.r_squared == pytest.approx(12.1 / 14)
    # residuals .2 .1 -1 .9 -.2; leverages .6 .3 .2 .3 .6; Sxx = 10
    scaled = np.array([0.2, 0.1, -1, 0.9, -0.2]) / np.array([0.4, 0.7, 0.8, 0.7, 0.4])
    error = np.sqrt((((x - 2) * scaled) ** 2).sum()) / 10
    assert fit.slope.high - 1.1 == pytest.approx(scipy.stats.t.ppf(0.975, 3) * error)
    assert "HC3" in fit.slope.method


def test_band_is_the_interval_of_the_coefficients_at_zero() -> None:
    fit = linear_fit([0, 1, 2, 3, 4], [1, 2, 2, 5, 5])
    low, high = fit.band([0.0])
    assert (low[0], high[0]) == pytest.approx((fit.intercept.low, fit.intercept.high))
    assert fit.predict([10.0])[0] == pytest.approx(11.8)


def test_growth_by_hand() -> None:
    fit = linear_fit([0, 1, 2, 3, 4], [10.0, 11.2, 11.9, 13.1, 13.9])
    a, b = fit.intercept.value, fit.slope.value
    found = fit.growth(0, 100)
    assert found.value == pytest.approx((a + 100 * b) / a)
    assert found.low < found.value < found.high
    assert linear_fit([1, 2, 3], [1, 2, 3]).growth(0, 1).value is None


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.integers(2, 30))
def test_points_on_a_line_give_the_line(slope: float, intercept: float, n: int) -> None:
    x = np.arange(n)
    fit = linear_fit(x, intercept + slope * x)
    tolerance = 1e-8 * (abs(slope) * n + abs(intercept))
    assert fit.slope.value == pytest.approx(slope, abs=tolerance)
    if n > 2:
        assert fit.slope.high == fit.slope.low
    else:
        assert fit.slope.low is None and "more than 2" in fit.slope.note


def test_constant_latency_has_slope_zero_and_no_r_squared() -> None:
    fit = linear_fit([100, 300, 700, 1900], [0.1 + 0.2] * 4)
    assert (fit.slope.value, fit.slope.low, fit.slope.high) == (0, 0, 0)
    assert fit.r_squared is None


def test_clusters_of_one_equal_no_clusters() -> None:
    x = np.arange(20.0)
    y = x + RNG.normal(size=20)
    free, single = linear_fit(x, y), linear_fit(x, y, range(20))
    np.testing.assert_allclose(free.solution.covariance, single.solution.covariance)
    assert (free.solution.freedom, single.solution.freedom) == (18, 18)


@pytest.mark.parametrize("clustered", [False, True])
def test_coverage_under_unequal_noise(clustered: bool) -> None:
    rng = np.random.default_rng(1)
    image = np.repeat(np.arange(15), 4)
    hits = 0
    for _ in range(400):
        x = rng.uniform(1, 10, 15)[image] if clustered else rng.uniform(1, 10, 60)
        noise = rng.normal(size=15)[image] if clustered else rng.normal(size=60)
        fit = linear_fit(x, 5 + 2 * x + 0.3 * x * noise, image if clustered else None)
        hits += fit.slope.low <= 2 <= fit.slope.high
    assert 0.92 <= hits / 400 <= 0.985


def test_a_point_of_leverage_one_is_told() -> None:
    fit = linear_fit([1, 1, 1, 2], [1.0, 1.2, 0.8, 3.0])
    assert "equal noise" in fit.slope.method
    # means 1 and 3; s² = 0.08 / 2, variance of the slope s²·(1/3 + 1)
    half = scipy.stats.t.ppf(0.975, 2) * np.sqrt(0.04 * 4 / 3)
    assert (fit.slope.value, fit.slope.high) == pytest.approx((2.0, 2 + half))


@pytest.mark.parametrize("x", [[5, 5, 5], [5]])
def test_a_single_x_is_refused(x: list[float]) -> None:
    with pytest.raises(UserError, match="do not determine intercept, x"):
        linear_fit(x, [1.0] * len(x))


def test_several_columns_of_very_different_size() -> None:
    flops, tokens = RNG.uniform(1e12, 9e12, 40), RNG.uniform(1, 9, 40)
    y = 4 + 2e-12 * flops + 0.5 * tokens + RNG.normal(0, 0.01, 40)
    fit = multi_linear_fit(np.column_stack([flops, tokens]), y, ["flops", "tokens"])
    assert fit.coefficients["flops"].low < 2e-12 < fit.coefficients["flops"].high
    assert fit.coefficients["tokens"].value == pytest.approx(0.5, rel=0.02)
    np.testing.assert_allclose(fit.predict(np.column_stack([flops, tokens])), y, atol=0.1)
    through_zero = multi_linear_fit([[1.0], [2.0]], [3.0, 6.0], ["x"], intercept=False)
    assert through_zero.intercept is None
    assert through_zero.coefficients["x"].value == pytest.approx(3)


def test_columns_that_repeat_each_other_are_refused() -> None:
    x = np.arange(9.0)
    with pytest.raises(UserError, match="do not determine intercept, crops, patches"):
        multi_linear_fit(np.column_stack([x, 576 * x]), x, ["crops", "patches"])
    with pytest.raises(UserError, match=r"\(9, 2\) found; expected \(9, 1\)"):
        multi_linear_fit(np.column_stack([x, x]), x, ["one"])


@given(st.floats(-2, 3), st.floats(0.01, 100))
def test_power_laws_are_recovered(exponent: float, scale: float) -> None:
    x = np.array([1.0, 2, 5, 20, 100])
    fit = power_law_fit(x, scale * x**exponent)
    assert fit.exponent.value == pytest.approx(exponent, abs=1e-6)
    assert fit.scale.value == pytest.approx(scale, rel=1e-6)
    np.testing.assert_allclose(fit.predict(x), scale * x**exponent, rtol=1e-6)


def test_a_fixed_cost_lowers_the_exponent() -> None:
    x = np.arange(1.0, 50)
    fit = power_law_fit(x, 10 + x)
    assert fit.exponent.below(1)
    assert power_law_fit(x, 10 + x - linear_fit(x, 10 + x).intercept.value).exponent.within(
        1 - 1e-9, 1 + 1e-9
    )
    with pytest.raises(UserError, match="at or below zero"):
        power_law_fit([0, 1], [1, 2])
