import numpy as np
import pandas as pd
import pytest

from vlm_latency.errors import UserError
from vlm_latency.statistics import mark_outliers

STEADY = [10.0, 10.1, 9.9, 10.2, 9.8, 10.0, 10.1, 9.9]


def shape(slow: float = 15.0, **columns: object) -> pd.DataFrame:
    return pd.DataFrame(
        {"T_total": [*STEADY, slow], "num_crops": 3, "num_output_tokens": 4} | columns
    )


def quiet(last: float) -> list[float]:
    return [0.0] * len(STEADY) + [last]


@pytest.mark.parametrize(
    ("columns", "cause"),
    [
        ({}, "unexplained"),
        ({"first_of_shape": [False] * 8 + [True]}, "first of shape"),
        ({"first_of_shape": pd.array([None] * 9, "boolean")}, "unexplained"),
        ({"sm_clock_mhz": [1980] * 8 + [1200]}, "clock drop or throttling"),
        ({"sm_clock_mhz": [1980] + [1930] * 7 + [1900]}, "unexplained"),  # at its power limit
        ({"throttle_reasons": [""] * 8 + ["sw_thermal_slowdown"]}, "clock drop or throttling"),
        ({"throttle_reasons": ["sw_power_cap"] * 9}, "unexplained"),  # named at a full clock too
        (
            {"throttle_reasons": ["sw_power_cap"] * 9, "sm_clock_mhz": [1980] * 8 + [1700]},
            "clock drop or throttling",
        ),
        ({"throttle_reasons": [""] * 9}, "unexplained"),
        ({"throttle_reasons": [None] * 9}, "unexplained"),
        ({"involuntary_switches": quiet(7)}, "involuntary context switches"),
        ({"steal_ms": quiet(4)}, "steal time"),
        ({"steal_ms": [3.0] * 9}, "unexplained"),
        ({"first_of_length": [False] * 8 + [True]}, "first visit of a length"),
        (
            {"first_of_length": False, "new_kv_lengths": [0] * 8 + [4]},
            "first visit of a length",
        ),
        ({"host_canary_ms": [0.1] * 8 + [0.2]}, "slow host"),
        ({"host_canary_ms": [0.1] * 8 + [0.11]}, "unexplained"),
        ({"host_canary_ms": [0.1] * 4 + [0.1] * 4 + [0.15]}, "slow host"),
        ({"steal_ms": quiet(4), "first_of_shape": [False] * 8 + [True]}, "first of shape"),
    ],
)
def test_the_likely_cause(columns: dict[str, object], cause: str) -> None:
    marks = mark_outliers(shape(**columns))
    assert marks["outlier"].tolist() == [False] * 8 + [True]
    assert marks["outlier_cause"].tolist() == [None] * 8 + [cause]


def test_shapes_are_judged_by_themselves() -> None:
    df = pd.concat(
        [shape(10.0), shape(10.0).assign(num_crops=9, T_total=np.array([*STEADY, 10]) * 5)]
    )
    df.index = pd.Index(range(100, 118))
    marks = mark_outliers(df)
    assert not marks["outlier"].any()
    assert marks.index.equals(df.index)
    assert mark_outliers(df, by=()).shape == (18, 2)


def test_nothing_is_judged_by_four_runs() -> None:
    assert not mark_outliers(shape().tail(4))["outlier"].any()


def test_a_constant_shape_allows_one_percent() -> None:
    steady = {"T_total": [10.0] * 8}
    assert not mark_outliers(pd.DataFrame({"T_total": [*steady["T_total"], 10.09]}))[
        "outlier"
    ].any()
    assert (
        mark_outliers(pd.DataFrame({"T_total": [*steady["T_total"], 10.11]}))["outlier"].sum() == 1
    )


def test_what_was_not_measured_is_not_marked() -> None:
    marks = mark_outliers(shape(np.nan))
    assert not marks["outlier"].any()
    with pytest.raises(UserError, match="no column T_x"):
        mark_outliers(shape(), "T_x")


def test_a_shape_of_failed_runs_alone_is_no_outlier() -> None:
    latency = [np.nan] * 6 + [1.0, 1.01, 1.02, 1.0, 1.0, 9.0]
    table = pd.DataFrame({"T_total": latency, "num_crops": [1] * 6 + [2] * 6})
    assert mark_outliers(table)["outlier"].tolist() == [False] * 11 + [True]


def test_a_disturbed_run_says_so_though_it_was_not_slow() -> None:
    """The cause comes from other columns than the time: runs can be left out by it, honestly."""
    marks = mark_outliers(shape(10.0, host_canary_ms=[0.1] * 8 + [0.2]))
    assert not marks["outlier"].any()
    assert marks["outlier_cause"].tolist() == [None] * 8 + ["slow host"]


def test_a_length_is_no_cause_where_new_ones_cost_nothing() -> None:
    marks = mark_outliers(shape(first_of_length=[False] * 8 + [True]), lengths_cost=False)
    assert marks["outlier_cause"].tolist() == [None] * 8 + ["unexplained"]
