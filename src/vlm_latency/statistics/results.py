"""Result types of all statistics: frozen dataclasses with interval, method and n."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from vlm_latency.errors import DataError

Floats = NDArray[np.float64]

# Rounding error of sums of a few hundred thousand doubles; what varies less does not vary.
ROUNDING = 1e-12


def student(level: float, freedom: float) -> float:
    """Give the t between whose negative and itself a share `level` of Student's distribution lies.

    >>> f"{student(0.95, 9):.3f}"
    '2.262'
    """
    return float(scipy.special.stdtrit(freedom, (1 + level) / 2))


def plain(value: Any) -> Any:
    """Turn results, arrays and numpy scalars into JSON-able data; NaN and infinity become None.

    >>> plain({"a": np.float64("nan"), "b": (1, np.int64(2))})
    {'a': None, 'b': [1, 2]}
    """
    if is_dataclass(value) and not isinstance(value, type):
        shown = (f for f in fields(value) if f.metadata.get("plain", True))
        return {f.name: plain(getattr(value, f.name)) for f in shown}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return None if type(value).__name__ == "NAType" else value  # pandas is not imported for this


class Result:
    """Base of the results: plain data on request."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-able data (NaN and infinity as None)."""
        data: dict[str, Any] = plain(self)
        return data


@dataclass(frozen=True)
class Estimate(Result):
    """A number with its two-sided confidence interval.

    Parameters
    ----------
    value : float or None
        The point estimate; None where it is not defined (a ratio over zero).
    low, high : float or None
        Ends of the interval; None where that side is unbounded or cannot be computed, and `note`
        then says why.
    level : float
        Confidence level, 0.95 for 95 %.
    n : int
        Observations that went in.
    method : str
        How the interval was made.
    note : str
        What a reader has to know; empty when there is nothing.

    Examples
    --------
    >>> e = Estimate(12.34, 11.96, 12.81, 0.95, 40, "t")
    >>> f"{e:.1f} ms"
    '12.3 [12.0, 12.8] ms'
    >>> e.above(11.5), e.below(12.5)
    (True, False)
    """

    value: float | None
    low: float | None
    high: float | None
    level: float
    n: int
    method: str
    note: str = ""

    def above(self, x: float) -> bool:
        """Say whether the whole interval lies above `x`; an unbounded low end never does."""
        return self.low is not None and self.low - x > ROUNDING * abs(x)

    def below(self, x: float) -> bool:
        """Say whether the whole interval lies below `x`; an unbounded high end never does."""
        return self.high is not None and x - self.high > ROUNDING * abs(x)

    def within(self, low: float, high: float) -> bool:
        """Say whether the whole interval lies in [low, high], ends included."""
        return not (
            self.low is None
            or self.high is None
            or low - self.low > ROUNDING * abs(low)
            or self.high - high > ROUNDING * abs(high)
        )

    def __format__(self, spec: str) -> str:
        def shown(x: float | None) -> str:
            return "?" if x is None else format(x, f"z{spec or '.4g'}")  # z: no "-0 %"

        if self.low is None and self.high is None:
            return f"{shown(self.value)} (no interval)"
        return f"{shown(self.value)} [{shown(self.low)}, {shown(self.high)}]"

    def __str__(self) -> str:
        return format(self) + (f"; {self.note}" if self.note else "")


def as_values(name: str, values: ArrayLike, *, positive: bool = False) -> Floats:
    """Return `values` as a 1-D float array.

    Raises
    ------
    DataError
        When there is none, when it is not one-dimensional, or when it holds NaN, infinity or,
        with `positive`, a number that is not above zero.
    """
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not array.size:
        raise DataError(f"{name} has shape {array.shape}; expected a list with at least one number")
    if bad := int((~np.isfinite(array)).sum()):
        raise DataError(
            f"{name} holds {bad} NaN or infinite of {array.size} values: drop what was not measured"
        )
    if positive and (bad := int((array <= 0).sum())):
        raise DataError(f"{name} holds {bad} of {array.size} values at or below zero; > 0 expected")
    return array


def as_pairs(
    names: tuple[str, str], x: ArrayLike, y: ArrayLike, *, positive: bool = False
) -> tuple[Floats, Floats]:
    """Return two float arrays of one length; raises DataError as `as_values` does."""
    first = as_values(names[0], x, positive=positive)
    second = as_values(names[1], y, positive=positive)
    if first.size != second.size:
        raise DataError(
            f"{names[0]} has {first.size} values and {names[1]} {second.size}; expected pairs"
        )
    return first, second


def as_codes(clusters: ArrayLike | None, n: int) -> NDArray[np.int64]:
    """Number the clusters 0, 1, …; every observation is its own cluster when there are none.

    Raises
    ------
    DataError
        When the labels are not `n`, or one is missing.
    """
    if clusters is None:
        return np.arange(n)
    import pandas as pd

    labels = clusters if isinstance(clusters, pd.Series) else np.asarray(clusters)
    codes = pd.factorize(labels)[0]
    if len(codes) != n or (codes < 0).any():
        raise DataError(
            f"{len(codes)} cluster labels ({int((codes < 0).sum())} missing) for {n} values; "
            "give each value its image"
        )
    return codes
