"""What predicts latency: errors on shapes that a predictor has not seen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import scipy
from numpy.typing import ArrayLike

from vlm_latency.errors import DataError
from vlm_latency.statistics.means import carried, mean_estimate
from vlm_latency.statistics.results import (
    ROUNDING,
    Estimate,
    Floats,
    Result,
    as_codes,
    as_values,
    student,
)

# Shapes are left out one by one up to this number, in so many groups beyond: refits are dear.
LEFT_OUT = 30
NO_MEDIAN = (
    "no interval: a shape moves all fits, and ranks of the errors (82 to 98 %) do not know it"
)


class Fitted(Protocol):
    """Anything that predicts latencies from rows of columns."""

    def predict(self, X: ArrayLike) -> Floats:
        """Return one latency per row of `X`, shape (n, k)."""


Fit = Callable[[Floats, Floats], Fitted]


@dataclass(frozen=True)
class NonNegativeFit(Result):
    """y = Σ coefficient·x with no coefficient below zero; see `nnls_relative_fit`."""

    coefficients: dict[str, float]
    median_error: float
    n: int
    method: str

    def predict(self, X: ArrayLike) -> Floats:
        """Return the fit at each row of `X`, shape (n, k)."""
        return np.asarray(X, float) @ np.array(list(self.coefficients.values()))


def nnls_relative_fit(
    X: ArrayLike, y: ArrayLike, names: Sequence[str] | None = None
) -> NonNegativeFit:
    """Fit latency by costs that only add: no coefficient is below zero.

    Minimises Σ ((X·β − y) / y)², so a request of 20 ms counts as much as one of 20 s. A constant
    cost per request is a column of ones.

    Parameters
    ----------
    X : array_like, shape (n, k)
        Costs of each request, such as TFLOP, GB moved, launches.
    y : array_like, shape (n,)
        Latency in ms, above zero.
    names : sequence of k strings, optional
        Of the columns; by default "x0", "x1", …

    Returns
    -------
    NonNegativeFit
        Coefficients in ms per unit of each column, 0 for one that does not help;
        `median_error` is the median of |fit / y − 1| over the points of the fit.

    Raises
    ------
    DataError
        For NaN, infinity, latencies not above zero, or shapes that do not agree.

    Examples
    --------
    >>> fit = nnls_relative_fit([[1, 10], [2, 10], [4, 20]], [7.0, 9.0, 18.0], ["TFLOP", "GB"])
    >>> {name: round(value, 9) for name, value in fit.coefficients.items()}
    {'TFLOP': 2.0, 'GB': 0.5}
    """
    y = as_values("y", y, positive=True)
    X = _table(X, y.size)
    names = list(names) if names is not None else [f"x{i}" for i in range(X.shape[1])]
    if len(names) != X.shape[1]:
        raise DataError(f"{len(names)} names found for {X.shape[1]} columns")
    scaled = X / y[:, None]
    scale = np.abs(scaled).max(axis=0)
    scale[scale == 0] = 1
    beta = scipy.optimize.nnls(scaled / scale, np.ones_like(y))[0] / scale
    return NonNegativeFit(
        dict(zip(names, map(float, beta), strict=True)),
        float(np.median(np.abs(X @ beta / y - 1))),
        y.size,
        "non-negative least squares of the relative error",
    )


@dataclass(frozen=True)
class AsGiven:
    """A predictor that is not fitted: its one column is the prediction, in ms.

    >>> AsGiven.fit([[1.0]], [2.0]).predict([[3.0], [4.0]])
    array([3., 4.])
    """

    @classmethod
    def fit(cls, X: ArrayLike, y: ArrayLike) -> AsGiven:
        """Return the predictor, whatever was measured."""
        return cls()

    def predict(self, X: ArrayLike) -> Floats:
        """Return the column of `X`, shape (n, 1)."""
        return np.asarray(X, float)[:, 0]


@dataclass(frozen=True)
class CrossValidation(Result):
    """Errors of predictors on held-out shapes; see `cross_validate`.

    `mape` is the mean and `median_error` the median of |prediction / measured − 1|.
    """

    mape: dict[str, Estimate]
    median_error: dict[str, Estimate]
    n: int
    n_groups: int
    method: str
    measured: Floats = field(repr=False, metadata={"plain": False})
    predicted: dict[str, Floats] = field(repr=False, metadata={"plain": False})
    groups: np.ndarray = field(repr=False, metadata={"plain": False})
    without: dict[str, Floats] = field(repr=False, metadata={"plain": False})

    def error_ratio(self, name: str, alternative: str, level: float = 0.95) -> Estimate:
        """Return the mean error of `name` over that of `alternative`, on the same points."""
        of, over = (np.abs(self.predicted[key] / self.measured - 1) for key in (name, alternative))
        if over.mean() <= ROUNDING:
            note = f"{alternative} makes no error: no ratio to it"
            return Estimate(None, None, None, level, self.n, "none", note)
        with np.errstate(divide="ignore", invalid="ignore"):
            without = self.without[name] / self.without[alternative]
        return _jackknifed(float(of.mean() / over.mean()), without, level, self.n)

    def interval(
        self,
        name: str,
        prediction: float,
        level: float = 0.95,
        runs: Sequence[ArrayLike] | None = None,
    ) -> Estimate:
        """Return a new `prediction` of `name` with the interval of split conformal prediction.

        The new latency lies within a factor of the prediction: the rank ⌈level · (shapes + 1)⌉
        among the factors by which held-out shapes were missed, every shape of weight one. It
        holds at about `level` as far as the new shape is one more like those measured; with fewer
        shapes than that rank (19 at 95 %) no interval does, and there is none.

        Parameters
        ----------
        runs : sequence of array_like, optional
            Latencies of the single runs behind each of the n points: the interval is then for
            one request, without them for the mean of repeated requests.
        """
        single = [np.atleast_1d(y) for y in (self.measured if runs is None else runs)]
        sizes = np.array([len(own) for own in single])
        codes = np.repeat(self.groups, sizes)
        ratio = np.concatenate(single) / np.repeat(self.predicted[name], sizes)
        what = "the mean of repeated requests" if runs is None else "one request"
        method = f"conformal ranks over {self.n_groups} held-out shapes, for {what}"
        if level * (self.n_groups + 1) > self.n_groups * (1 + 1e-9):
            note = (
                f"an interval needs {math.ceil(level / (1 - level) - 1e-9)} shapes, found "
                f"{self.n_groups}"
            )
            return Estimate(prediction, None, None, level, self.n, "none", note)
        with np.errstate(divide="ignore", invalid="ignore"):
            missed = np.where(ratio > 0, np.abs(np.log(ratio)), np.inf)
        weight = 1 / np.bincount(codes)[codes] / (self.n_groups + 1)
        order = np.argsort(missed)
        reached = int(np.searchsorted(np.cumsum(weight[order]), level * (1 - 1e-9)))
        factor = float(np.exp(missed[order[min(reached, order.size - 1)]]))
        if not math.isfinite(factor):
            note = "a held-out shape was predicted to take no time"
            return Estimate(prediction, None, None, level, self.n, "none", note)
        return Estimate(prediction, prediction / factor, prediction * factor, level, self.n, method)


def cross_validate(
    groups: ArrayLike,
    predictors: Mapping[str, tuple[ArrayLike, Fit]],
    y: ArrayLike,
    *,
    level: float = 0.95,
) -> CrossValidation:
    """Predict each shape by what was fitted on all the others.

    Parameters
    ----------
    groups : array_like, shape (n,)
        The shape of each point; whole shapes are left out.
    predictors : mapping of name to (X, fit)
        X of shape (n, k): what this predictor looks at. ``fit(X, y)`` returns an object with
        ``predict(X)``: `nnls_relative_fit`, `AsGiven.fit`, or one's own.
    y : array_like, shape (n,)
        Measured latency in ms, above zero.
    level : float
        Of the intervals, which treat shapes as the independent units.

    Notes
    -----
    Any two of the fits share most of their shapes, and a shape that moves one fit moves them all:
    intervals that take held-out errors for independent hold 88 to 92 %. These come from leaving
    out each shape (beyond 30 each of 30 groups of them) and doing everything again, fits included,
    with Student's t on the logarithm of the mean error. From few shapes they are rather too wide
    (98 to 99 % at 8). Medians have none.

    Raises
    ------
    DataError
        Below 2 groups, for NaN or infinity, or latencies not above zero.

    Examples
    --------
    >>> flops, launches = np.array([1, 2, 3, 4, 5, 6.0]), np.array([9, 1, 7, 3, 8, 2.0])
    >>> found = cross_validate(
    ...     range(6),
    ...     {"FLOPs": (flops, nnls_relative_fit),
    ...      "both": (np.column_stack([flops, launches]), nnls_relative_fit)},
    ...     10 * flops + 3 * launches,
    ... )
    >>> {name: round(error.value, 2) for name, error in found.mape.items()}
    {'FLOPs': 0.27, 'both': 0.0}
    """
    y = as_values("y", y, positive=True)
    codes = as_codes(groups, y.size)
    n_groups = int(codes.max()) + 1
    if n_groups < 2:
        raise DataError("1 shape found; leaving one out needs at least 2")
    mape, median_error, predicted, without = {}, {}, {}, {}
    for name, (columns, fit) in predictors.items():
        X = _table(columns, y.size)
        guess = _held_out(fit, X, y, codes)
        error = np.abs(guess / y - 1)
        predicted[name] = guess
        without[name] = _errors_without(fit, X, y, codes)
        mape[name] = _jackknifed(float(error.mean()), without[name], level, y.size)
        median_error[name] = Estimate(
            float(np.median(error)), None, None, level, y.size, "none", NO_MEDIAN
        )
    return CrossValidation(
        mape, median_error, y.size, n_groups, "leave one shape out", y, predicted, codes, without
    )


def _held_out(fit: Fit, X: Floats, y: Floats, codes: np.ndarray) -> Floats:
    """Predict each shape by a fit on all the others."""
    guess = np.empty_like(y)
    for shape in range(int(codes.max()) + 1):
        out = codes == shape
        guess[out] = fit(X[~out], y[~out]).predict(X[out])
    return guess


def _errors_without(fit: Fit, X: Floats, y: Floats, codes: np.ndarray) -> Floats:
    """Return the mean held-out error without each group of shapes, shape (groups,)."""
    groups = min(int(codes.max()) + 1, LEFT_OUT)
    if groups < 3:
        return np.empty(0)
    dealt = codes % groups
    total = np.zeros(groups)
    for pair in itertools.combinations(range(groups), 2):
        # One fit without both predicts each of them as if the other had never been measured.
        out = np.isin(dealt, pair)
        error = np.abs(fit(X[~out], y[~out]).predict(X[out]) / y[out] - 1)
        for without, own in (pair, pair[::-1]):
            total[without] += error[dealt[out] == own].sum()
    return np.asarray(total / (y.size - np.bincount(dealt)))


def _jackknifed(value: float, without: Floats, level: float, n: int) -> Estimate:
    """Return a mean error, or a ratio of two, with Student's t on the jackknife of its logarithm."""
    if value <= ROUNDING:
        return Estimate(value, value, value, level, n, "no variation", "every error is zero")
    groups = without.size
    if groups < 2 or not (np.isfinite(without) & (without > 0)).all():
        note = "an interval needs at least 3 shapes, and errors whatever shape is left out"
        return Estimate(value, None, None, level, n, "none", note)
    squares = (np.log(without) - np.log(without).mean()) ** 2
    half = student(level, groups - 1) * math.sqrt((groups - 1) / groups * squares.sum())
    note = ""
    if carried(squares):
        note = "one shape makes most of the variance: the interval may be too narrow"
    method = f"t on the logarithm, jackknife of everything over {groups} shapes"
    return Estimate(value, value * math.exp(-half), value * math.exp(half), level, n, method, note)


def transfer_error(
    fit: Fit,
    train: tuple[ArrayLike, ArrayLike],
    test: tuple[ArrayLike, ArrayLike],
    groups: ArrayLike | None = None,
    *,
    level: float = 0.95,
) -> Estimate:
    """Fit on one regime, predict another: mean of |prediction / measured − 1|.

    Parameters
    ----------
    fit : callable
        As in `cross_validate`.
    train, test : (X, y)
        The vision sweep and the language sweep, or the reverse; y in ms, above zero.
    groups : array_like, optional
        The shape of each point of `test`.

    Returns
    -------
    Estimate
        Of this one fit: its interval knows the scatter of `test`, not what other training shapes
        would have given.

    Examples
    --------
    >>> transfer_error(nnls_relative_fit, ([1, 2, 3], [2.0, 4.0, 6.0]), ([1, 2], [4.0, 8.0])).value
    0.5
    """
    y_train, y_test = (as_values("y", y, positive=True) for y in (train[1], test[1]))
    fitted = fit(_table(train[0], y_train.size), y_train)
    error = np.abs(fitted.predict(_table(test[0], y_test.size)) / y_test - 1)
    return mean_estimate(error, groups, level=level)


def _table(X: ArrayLike, n: int) -> Floats:
    """Return X as (n, k); a single column may be given as a list."""
    table = np.asarray(X, dtype=float)
    if table.ndim == 1:
        table = table[:, None]
    if table.ndim != 2 or len(table) != n or not np.isfinite(table).all():
        raise DataError(
            f"X of shape {table.shape} found; expected one row for each of {n} latencies, "
            "without NaN"
        )
    return table
