"""Numbers in words."""

import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_latency.plots.notation import ends, interval, number
from vlm_latency.plots.tables import to_csv, to_latex

finite = st.floats(-1e12, 1e12)


@given(finite)
def test_a_written_number_is_within_its_digits(value):
    read = float(number(value).replace(",", ""))
    assert read == pytest.approx(value, rel=0.006, abs=1e-300)


@given(finite, st.floats(1e-6, 1e6))
def test_a_written_interval_holds_its_value(value, width):
    text = interval({"value": value, "low": value - width, "high": value + width})
    shown, _, bounds = text.replace(",", "").partition(" [")
    low, high = map(float, bounds.rstrip("]").split())
    assert low <= float(shown) <= high


@pytest.mark.parametrize(
    ("statistic", "text"),
    [
        (None, "? ms"),
        (math.nan, "? ms"),
        (3, "3 ms"),
        ({"value": 3.0, "low": None, "high": None}, "3 ms (no interval)"),
        ({"value": 3.0, "low": 3.0, "high": 3.0}, "3 ms [3, 3]"),
        ({"value": 3.0, "low": 2.0, "high": math.inf}, "3.0 ms [2.0, ?]"),
        ({"value": None, "low": None, "high": None}, "? ms"),
    ],
)
def test_intervals_that_lack_something(statistic, text):
    assert interval(statistic, "ms") == text


def test_ends_are_floats_or_none():
    assert ends({"value": 1, "low": 0, "high": math.inf}) == (1.0, 0.0, None)
    assert math.isnan(ends(None)[0])


def test_latex_escapes_and_keeps_numbers_whole():
    table = pd.DataFrame(
        {"T_total & co": ["a_b", None], "n": [12345, 2], "ms": [1.23456, float("nan")]}
    )
    assert to_latex(table).splitlines() == [
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"T\_total \& co & n & ms \\",
        r"\midrule",
        r"a\_b & 12345 & 1.235 \\",
        r"-- & 2 & -- \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_csv_keeps_every_digit():
    assert to_csv(pd.DataFrame({"ms": [1 / 3]})) == "ms\n0.3333333333333333\n"
