import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from vlm_latency.errors import UserError
from vlm_latency.statistics import (
    floor_and_line,
    headline_line,
    linear_fit,
    marginal_change,
    multi_linear_fit,
    power_law_fit,
    robust_line,
)

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


def test_leaving_out_clusters_by_hand() -> None:
    image = np.repeat(np.arange(6), [1, 2, 3, 4, 5, 6])
    x = RNG.uniform(0, 10, image.size)
    y = x + RNG.normal(size=6)[image] + RNG.normal(size=image.size)
    fit = linear_fit(x, y, image)
    without = [linear_fit(x[image != i], y[image != i]).slope.value for i in range(6)]
    # CR3 is the jackknife about the full fit
    error = np.sqrt(((np.array(without) - fit.slope.value) ** 2).sum())
    slope = np.array([0.0, 1.0])
    assert fit.slope.high - fit.slope.value == pytest.approx(fit.solution.t(slope) * error)
    # Satterthwaite's degrees of freedom by the n × n matrices that they stand for
    X = np.column_stack([np.ones_like(x), x])
    inverse = np.linalg.inv(X.T @ X)
    keep = np.eye(x.size) - X @ inverse @ X.T
    g = [
        keep[:, image == i]
        @ np.linalg.solve(keep[np.ix_(image == i, image == i)], own)
        @ inverse[1]
        for i in range(6)
        for own in [X[image == i]]
    ]
    F = np.array(g) @ np.array(g).T
    freedom = np.sqrt(4 * np.trace(F) ** 2 / (F**2).sum())
    assert fit.solution.t(slope) == pytest.approx(scipy.stats.t.ppf(0.975, freedom))


def test_a_cluster_that_alone_fixes_the_slope_leaves_no_interval() -> None:
    fit = linear_fit([1, 1, 1, 1, 1, 1, 2, 3], [1, 2, 1, 3, 2, 1, 4, 7], list("aabbccdd"))
    assert fit.slope.low is None and "one cluster alone" in fit.slope.note


def spiked(seed: int, spikes: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """15 requests of 5 runs: 10 + 0.14 x, a request's effect of 1 %, noise of 2 %, slow runs."""
    rng = np.random.default_rng(seed)
    request = np.repeat(np.arange(15), 5)
    x = np.linspace(288, 1344, 15)[request]
    y = (10 + 0.14 * x) * np.exp(rng.normal(0, 0.01, 15)[request] + rng.normal(0, 0.02, 75))
    return x, y + np.where(rng.random(75) < spikes, rng.exponential(150, 75), 0), request


def test_extreme_runs_do_not_rule_the_robust_line() -> None:
    found = [headline_line(*spiked(seed, 0.1)) for seed in range(40)]
    hits = [f.robust.slope.low <= 0.14 <= f.robust.slope.high for f in found]
    assert sum(hits) >= 34
    assert np.mean([abs(f.robust.slope.value - 0.14) for f in found]) < 0.003
    assert sum(f.chosen == "robust" and f.headline is f.robust for f in found) >= 36
    clean = [headline_line(*spiked(seed, 0)) for seed in range(40)]
    assert sum(f.chosen == "least squares" for f in clean) >= 36


def test_normal_noise_of_few_points_does_not_choose_the_robust_line() -> None:
    rng = np.random.default_rng(0)
    x = np.linspace(100, 1_400, 20)
    found = [headline_line(x, (10 + 0.14 * x) * rng.normal(1, 0.05, 20)) for _ in range(150)]
    assert sum(f.chosen == "robust" for f in found) <= 4


def test_robust_line_of_exact_and_of_few_points() -> None:
    x = np.arange(9.0)
    y = 5 + 2 * x
    y[4] = 1e6
    fit = robust_line(x, y)
    assert (fit.slope.value, fit.intercept.value) == pytest.approx((2, 5), rel=1e-6)
    assert robust_line([1, 2], [1, 2]).slope.low is None


def test_marginal_cost_by_hand() -> None:
    x = np.arange(1.0, 30)
    # slopes 2 at 1 and 30 at 29, 16 on average
    found = marginal_change(x, 7 + x + x**2 / 2 + RNG.normal(0, 0.1, 29))
    assert found.low < 28 / 16 < found.high
    assert marginal_change(x, 7 + RNG.normal(0, 0.1, 29)).value is None
    floor = marginal_change(x, np.maximum(7, x - 10) + RNG.normal(0, 0.05, 29))
    assert floor.above(1.5)
    with pytest.raises(UserError, match="do not determine"):
        marginal_change([1, 1, 2, 2], [1, 2, 3, 4])


def test_a_floor_is_told_from_a_line() -> None:
    rng = np.random.default_rng(0)
    request = np.repeat(np.arange(15), 5)
    x = np.linspace(288, 1344, 15)[request]
    made = {
        "line": 10 + 0.14 * x,
        "floor and line": np.maximum(18, 18 + 0.02 * (x - 650)),
        "floor": np.full(75, 18.0),
    }
    for truth, latency in made.items():
        held = []
        for _ in range(25):
            effect = rng.normal(0, 0.01, 15)[request] + rng.normal(0, 0.02, 75)
            y = latency * np.exp(effect)
            y[rng.integers(75, size=4)] += 40  # a slow run here and there
            found = floor_and_line(x, y, request, resamples=199)
            held.append(found.holds == truth)
            if truth == found.holds == "floor and line":
                assert 400 < found.free.value < 900
                assert found.predict([300.0])[0] == pytest.approx(found.floor.value)
        assert sum(held) >= 20
    assert floor_and_line([1, 2, 3, 4], [1, 1, 2, 3]).holds == "undecided"
    assert floor_and_line(np.arange(1.0, 9), 3 * np.arange(1.0, 9)).holds == "line"


def test_costs_that_grow_all_along_are_no_floor() -> None:
    rng = np.random.default_rng(1)
    request = np.repeat(np.arange(15), 5)
    x = np.linspace(288, 1344, 15)[request]
    held = []
    for _ in range(25):
        effect = rng.normal(0, 0.01, 15)[request] + rng.normal(0, 0.02, 75)
        found = floor_and_line(
            x, (20 + 0.05 * x + 8e-5 * x**2) * np.exp(effect), request, resamples=199
        )
        held.append(found.holds)
        assert found.holds == "line" or "better than a floor" in found.note
    assert "floor and line" not in held and held.count("undecided") > 5


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


def test_a_robust_line_of_few_images_has_no_interval_and_is_no_headline() -> None:
    x, image = np.tile([8.0, 16, 32, 64, 128], 5), np.repeat(np.arange(5), 5)
    y = 2 * x + np.random.default_rng(0).normal(0, 0.1, 25)
    y[4] += 500
    found = headline_line(x, y, image)
    assert found.robust.slope.value == pytest.approx(2, abs=0.01)
    assert found.robust.slope.low is None and "below 8" in found.robust.slope.note
    assert found.chosen == "least squares" and "no interval" in found.reason
    eight = robust_line(np.tile(x, 2), np.tile(y, 2), np.repeat(np.arange(10), 5))
    assert eight.slope.low is not None
