"""Outliers are marked with their likely cause, never removed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vlm_latency.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

# Below five runs of a shape a median and its deviation say nothing about a sixth.
FEWEST_RUNS = 5
# Nothing within 1 % of its shape's median is an outlier, however steady the others are.
SMALLEST_EXCESS = 0.01
NORMAL = 0.6744897501960817  # the median of a standard normal variable's absolute value
# A host whose fixed piece of work takes this much longer than in its quickest tenth is slow: a
# quick one varies by 10 %, and a shared one may be slow for more than half of the time.
SLOW_HOST, QUICK_TENTH = 1.3, 0.1
# A clock that runs this much under the median of the table has dropped: one that boosts, or runs at
# its power limit, varies by a few per cent all the time.
CLOCK_DROP = 0.97
# What the driver names at a full clock too: a limit that is near does not slow the clock yet.
HARMLESS = {"sw_power_cap"}


def mark_outliers(
    df: pd.DataFrame,
    value: str = "T_total",
    by: Sequence[str] = ("num_crops", "num_output_tokens"),
    k: float = 5.0,
    lengths_cost: bool = True,
) -> pd.DataFrame:
    """Mark the runs that took much longer than others of their shape, and what disturbed a run.

    Parameters
    ----------
    df : DataFrame
        One row per run.
    value : str
        Column to judge, in milliseconds; a row where it is missing is not marked.
    by : sequence of str
        Columns that make a shape; those absent from `df` are left out.
    k : float
        A run is an outlier above median + k · MAD of its shape (MAD scaled by 1.4826 to the
        standard deviation of a normal distribution), and at least 1 % above the median. A shape
        of fewer than 5 runs has no outliers.
    lengths_cost : bool
        Whether a length that is met for the first time may cost time here.

    Returns
    -------
    DataFrame
        Index of `df`; columns `outlier` (bool) and `outlier_cause`: what disturbed the run,
        whether it was slow for it or not. The cause comes from columns that hold no time of the
        run itself, and is the first that applies of "first of shape" (`first_of_shape`, of an
        outlier), "first visit of a length" (`first_of_length`, `new_kv_lengths`), "clock drop or
        throttling" (`sm_clock_mhz` under 97 % of its median, or a reason in `throttle_reasons`
        other than a software power cap, which is named at a full clock too), "slow host"
        (`host_canary_ms` above 130 % of its quickest tenth), "involuntary context switches"
        (`involuntary_switches`) and "steal time" (`steal_ms`), both more than usual for its shape
        by the same rule; "unexplained" for an outlier without any, None for other runs. Absent
        columns explain nothing.

    Raises
    ------
    DataError
        When `value` is no column of `df`.

    Examples
    --------
    >>> import pandas as pd
    >>> runs = pd.DataFrame({"T_total": [10.0, 10.1, 10.2, 10.1, 10.0, 14.0], "num_crops": 2,
    ...                      "steal_ms": [0, 0, 0, 0, 0, 4]})
    >>> mark_outliers(runs).query("outlier")
       outlier outlier_cause
    5     True    steal time
    """
    import pandas as pd

    if value not in df:
        raise DataError(f"no column {value} in the table; found {', '.join(map(str, df.columns))}")
    keys = [name for name in by if name in df]
    shape = df.groupby(keys, dropna=False).ngroup() if keys else pd.Series(0, index=df.index)

    def unusual(name: str, smallest: Callable[[pd.Series], pd.Series]) -> pd.Series:
        column = df[name].astype(float)
        median = column.groupby(shape).transform("median")
        deviation = (column - median).abs().groupby(shape).transform("median") / NORMAL
        excess = np.maximum(k * deviation, smallest(median))
        runs = column.groupby(shape).transform("count")
        return (column > median + excess) & (runs >= FEWEST_RUNS)

    outlier = unusual(value, lambda median: SMALLEST_EXCESS * median)
    causes: dict[str, pd.Series] = {}
    if "first_of_shape" in df:
        causes["first of shape"] = df["first_of_shape"].fillna(False).astype(bool) & outlier
    if lengths_cost and "first_of_length" in df:
        new = df["first_of_length"].fillna(False).astype(bool)
        if "new_kv_lengths" in df:
            new |= (df["new_kv_lengths"] > 0).fillna(False).astype(bool)
        causes["first visit of a length"] = new
    causes["clock drop or throttling"] = _slow_clock(df)
    if "host_canary_ms" in df:
        canary = df["host_canary_ms"].astype(float)
        causes["slow host"] = canary > SLOW_HOST * canary.quantile(QUICK_TENTH)
    for name, cause in (
        ("involuntary_switches", "involuntary context switches"),
        ("steal_ms", "steal time"),
    ):
        if name in df:
            causes[cause] = unusual(name, lambda median: 0 * median)
    why = pd.Series(np.select(list(causes.values()), list(causes), "unexplained"), df.index, object)
    told = outlier | (why != "unexplained")
    return pd.DataFrame({"outlier": outlier, "outlier_cause": why.where(told, None)})


def _slow_clock(df: pd.DataFrame) -> pd.Series:
    import pandas as pd

    slow = pd.Series(False, index=df.index)
    if "sm_clock_mhz" in df:
        clock = df["sm_clock_mhz"].astype(float)
        slow |= clock < CLOCK_DROP * clock.median()
    if "throttle_reasons" in df:
        reasons = df["throttle_reasons"].fillna("").astype(str).str.split(",")
        slow |= reasons.map(lambda names: bool(set(names) - HARMLESS - {""}))
    return slow
