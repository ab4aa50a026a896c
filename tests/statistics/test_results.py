import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_latency.errors import UserError
from vlm_latency.statistics import Estimate, linear_fit, mean_estimate, plain, summary
from vlm_latency.statistics.results import as_codes, as_values

FINITE = st.floats(-1e6, 1e6)


def test_plain_data_is_json_without_nan() -> None:
    data = plain({"x": np.array([1.0, np.nan, np.inf]), "n": np.int64(3), "flag": np.bool_(True)})
    assert data == {"x": [1.0, None, None], "n": 3, "flag": True}
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_results_say_method_and_n() -> None:
    data = summary([1.0]).to_dict()
    json.dumps(data, allow_nan=False)
    assert data["std"] is None
    assert data["mean"] == {
        "value": 1.0,
        "low": None,
        "high": None,
        "level": 0.95,
        "n": 1,
        "method": "none",
        "note": "an interval needs at least 2 independent values, found 1",
    }
    assert "solution" not in linear_fit([1, 2, 3], [1, 2, 4]).to_dict()


def test_an_unbounded_side_never_decides() -> None:
    e = Estimate(2.0, 1.8, None, 0.95, 10, "order statistics")
    assert e.above(1.5) and not e.below(100) and not e.within(0, 100)
    assert not Estimate(2.0, None, 2.5, 0.95, 10, "order statistics").above(-100)


@given(FINITE, st.floats(0, 1e3), FINITE)
def test_above_and_below_exclude_each_other(value: float, half: float, x: float) -> None:
    e = Estimate(value, value - half, value + half, 0.95, 5, "t")
    assert not (e.above(x) and e.below(x))
    assert e.within(value - half, value + half)


def test_the_printed_form_shows_what_is_missing() -> None:
    e = Estimate(0.5, -0.001, None, 0.95, 10, "t", "too few")
    assert f"{e:.0%}" == "50% [0%, ?]"
    assert str(e) == "0.5 [-0.001, ?]; too few"
    assert f"{Estimate(None, None, None, 0.95, 1, 'none')}" == "? (no interval)"


def test_an_interval_around_the_limit_is_on_neither_side() -> None:
    e = Estimate(1.0, 1.0 - 1e-15, 1.0 + 1e-15, 0.95, 5, "t")
    assert not e.above(1) and not e.below(1) and e.within(1, 1)


@pytest.mark.parametrize("bad", [[1.0, np.nan], [np.inf], [], [[1.0]]])
def test_values_that_are_no_list_of_numbers_are_refused(bad: list[float]) -> None:
    with pytest.raises(UserError, match="values"):
        as_values("values", bad)
    with pytest.raises(UserError, match="values"):
        mean_estimate(bad)


def test_clusters_must_fit_the_values() -> None:
    assert as_codes(["b", "a", "b"], 3).tolist() == [0, 1, 0]
    with pytest.raises(UserError, match="2 cluster labels"):
        as_codes([1, 2], 3)
    with pytest.raises(UserError, match="1 missing"):
        as_codes(["a", None], 2)


def test_the_package_imports_lightly() -> None:
    code = (
        "import sys, vlm_latency.statistics; "
        "print([m for m in ('kedro', 'torch', 'transformers', 'pandas', 'scipy.stats', "
        "'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
