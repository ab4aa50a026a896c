import numpy as np
import pytest
import scipy
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_latency.errors import UserError
from vlm_latency.statistics import (
    AsGiven,
    cross_validate,
    nnls_relative_fit,
    transfer_error,
)


@settings(deadline=None)
@given(st.lists(st.floats(0, 10), min_size=2, max_size=2), st.floats(0.1, 10))
def test_costs_that_add_are_recovered(costs: list[float], fixed: float) -> None:
    X = np.column_stack([np.ones(12), np.arange(12) * 1e12, (np.arange(12) % 5) * 1e-3])
    beta = np.array([fixed, costs[0] * 1e-12, costs[1] * 1e3])
    fit = nnls_relative_fit(X, X @ beta, ["fixed", "flops", "bytes"])
    part, expected = (X[-1] * np.array(b) for b in (list(fit.coefficients.values()), beta))
    np.testing.assert_allclose(part, expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(fit.predict(X), X @ beta, rtol=1e-6)


def test_relative_error_by_hand() -> None:
    # one column of ones: minimise (b/1 − 1)² + (b/4 − 1)², b = (1 + 1/4) / (1 + 1/16)
    fit = nnls_relative_fit([1, 1], [1.0, 4.0])
    b = 1.25 / 1.0625
    assert fit.coefficients["x0"] == pytest.approx(b)
    assert fit.median_error == pytest.approx(((b - 1) + (1 - b / 4)) / 2)


def test_no_cost_is_negative() -> None:
    X = np.column_stack([np.arange(1.0, 9), np.arange(8.0, 0, -1)])
    fit = nnls_relative_fit(X, 5 * X[:, 0] - 0.1 * X[:, 1])
    assert fit.coefficients["x1"] == 0
    assert nnls_relative_fit([[1, 0], [2, 0]], [1.0, 2.0]).coefficients["x1"] == 0


def test_leave_one_shape_out_by_hand() -> None:
    class Mean:
        def __init__(self, X: np.ndarray, y: np.ndarray) -> None:
            self.value = y.mean()

        def predict(self, X: np.ndarray) -> np.ndarray:
            return np.full(len(X), self.value)

    found = cross_validate(["a", "a", "b"], {"mean": (np.zeros(3), Mean)}, [1.0, 3.0, 4.0])
    # a is predicted as 4, b as 2: errors 3, 1/3, 1/2
    assert found.predicted["mean"].tolist() == [4, 4, 2]
    assert found.mape["mean"].value == pytest.approx((3 + 1 / 3 + 1 / 2) / 3)
    assert found.median_error["mean"].value == pytest.approx(1 / 2)
    assert (found.n, found.n_groups) == (3, 2)
    assert set(found.to_dict()) == {"mape", "median_error", "n", "n_groups", "method"}


def noisy() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = np.repeat(np.arange(30), 4)
    flops, launches = rng.uniform(1, 10, 30)[shape], rng.uniform(1, 100, 30)[shape]
    return shape, flops, launches, (3 * flops + launches) * rng.lognormal(0, 0.05, 120)


def test_the_better_predictor_errs_less() -> None:
    shape, flops, launches, y = noisy()
    both = np.column_stack([flops, launches])
    found = cross_validate(
        shape,
        {
            "FLOPs": (flops, nnls_relative_fit),
            "both": (both, nnls_relative_fit),
            "bound": (3 * flops + launches, AsGiven.fit),
        },
        y,
    )
    assert found.error_ratio("FLOPs", "both").above(1)
    assert found.median_error["both"].value == pytest.approx(0.05 * 0.6745, rel=0.25)
    assert found.mape["bound"].value == pytest.approx(found.mape["both"].value, rel=0.05)
    held_out = found.interval("both", 100.0)
    # rank 30 of 30 shapes: the farthest of 120 points within a run of its shape
    assert held_out.low * held_out.high == pytest.approx(100**2)
    assert 1.08 < held_out.high / 100 < 1.2


def test_conformal_ranks_by_hand() -> None:
    # 19 shapes, all predicted as 10; the farthest is missed by a factor of 2
    y = np.append(np.full(18, 10.0), 20.0)
    found = cross_validate(range(19), {"ten": (np.full(19, 10.0), AsGiven.fit)}, y)
    mean = found.interval("ten", 100.0)
    assert (mean.low, mean.high) == pytest.approx((50, 200))
    assert "the mean of repeated requests" in mean.method
    runs = [[own, own] for own in y[:-1]] + [[5.0, 40.0]]
    single = found.interval("ten", 100.0, runs=runs)
    # the 19th of 20 ranks: all of the last shape's weight is needed
    assert (single.low, single.high) == pytest.approx((25, 400))
    assert "one request" in single.method
    few = cross_validate(range(18), {"ten": (np.full(18, 10.0), AsGiven.fit)}, y[:18])
    assert few.interval("ten", 100.0).note == "an interval needs 19 shapes, found 18"


def test_from_one_regime_to_another() -> None:
    error = transfer_error(
        nnls_relative_fit, (np.arange(1.0, 9), 2 * np.arange(1.0, 9)), ([1.0, 2.0], [8.0, 2.0])
    )
    assert error.value == pytest.approx((0.75 + 1.0) / 2)


def test_bad_input_is_told() -> None:
    with pytest.raises(UserError, match="at least 2"):
        cross_validate([1, 1], {}, [1.0, 2.0])
    with pytest.raises(UserError, match="1 of 2 values at or below zero"):
        nnls_relative_fit([1, 2], [0.0, 1.0])
    with pytest.raises(UserError, match=r"X of shape \(3, 1\) found"):
        nnls_relative_fit([1, 2, 3], [1.0, 1.0])
    with pytest.raises(UserError, match="1 names found for 2 columns"):
        nnls_relative_fit([[1, 2]], [1.0], ["x"])


def test_intervals_of_held_out_errors_do_everything_again_without_each_shape() -> None:
    rng = np.random.default_rng(3)
    shape = np.repeat(np.arange(7), [1, 2, 1, 3, 1, 1, 2])
    X = np.column_stack([np.ones(11), rng.uniform(1, 5, 7)[shape]])
    y = X @ [3, 2] * np.exp(rng.normal(0, 0.1, 11))
    found = cross_validate(shape, {"line": (X, nnls_relative_fit)}, y)
    again = [
        cross_validate(shape[kept], {"line": (X[kept], nnls_relative_fit)}, y[kept]).mape["line"]
        for kept in (shape != left for left in range(7))
    ]
    logs = np.log([error.value for error in again])
    half = scipy.stats.t.ppf(0.975, 6) * np.sqrt(6 / 7 * ((logs - logs.mean()) ** 2).sum())
    error = found.mape["line"]
    assert (error.low, error.high) == pytest.approx(error.value * np.exp([-half, half]))
    assert found.median_error["line"].low is None and found.median_error["line"].note


def test_two_shapes_give_an_error_without_interval() -> None:
    found = cross_validate([0, 0, 1], {"x": ([1.0, 1.0, 2.0], nnls_relative_fit)}, [1.0, 1.1, 3.0])
    assert found.mape["x"].value is not None and found.mape["x"].low is None
    assert "at least 3 shapes" in found.mape["x"].note
    assert found.error_ratio("x", "x").low is None
