import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_latency.errors import UserError
from vlm_latency.statistics import a_a_false_alarms, compare_paired, compare_tables
from vlm_latency.statistics.comparison import paired_difference

RNG = np.random.default_rng(0)


def pairs(ratio: float, noise: float = 0.01, n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    level = RNG.lognormal(3, 0.5, n)  # what both of a pair share cancels
    return level * RNG.lognormal(0, noise, n), level * ratio * RNG.lognormal(0, noise, n)


@pytest.mark.parametrize(
    ("ratio", "noise", "verdict"),
    [
        (1.10, 0.01, "SLOWER"),
        (0.90, 0.01, "FASTER"),
        (1.00, 0.01, "SAME"),
        (1.005, 0.001, "SAME"),
        (1.00, 0.50, "UNDECIDED"),
    ],
)
def test_verdicts(ratio: float, noise: float, verdict: str) -> None:
    found = compare_paired(*pairs(ratio, noise))
    assert found.verdict == verdict
    assert found.ratio.low <= ratio <= found.ratio.high


def test_interval_by_hand() -> None:
    # log ratios 0.0, 0.1, 0.2: mean 0.1, standard error 0.1/√3, t(0.975, 2) = 4.302653
    found = compare_paired([1.0, 1.0, 1.0], np.exp([0.0, 0.1, 0.2]))
    half = 4.302653 * 0.1 / np.sqrt(3)
    assert found.ratio.value == pytest.approx(np.exp(0.1))
    assert (found.ratio.low, found.ratio.high) == pytest.approx(
        (np.exp(0.1 - half), np.exp(0.1 + half)), rel=1e-6
    )
    assert found.smallest_visible == pytest.approx(np.exp(half) - 1, rel=1e-6)
    assert found.note == "3 pairs; intervals hold from 20: repeat more"


def test_certain_and_within_the_margin_is_the_same() -> None:
    baseline = np.linspace(10, 20, 30)
    found = compare_paired(baseline, baseline * 1.01)
    assert found.different and found.verdict == "SAME"
    assert compare_paired(baseline, baseline * 1.01, margin=0.005).verdict == "SLOWER"


@given(st.floats(0.2, 5), st.floats(1e-3, 1e6))
def test_constant_latencies(ratio: float, latency: float) -> None:
    found = compare_paired([latency] * 20, [latency * ratio] * 20)
    assert found.ratio.low == found.ratio.high == pytest.approx(ratio)
    assert found.smallest_visible == 0
    expected = "SAME" if abs(ratio - 1) <= 0.02 else "FASTER" if ratio < 1 else "SLOWER"
    assert found.verdict == expected or abs(abs(ratio - 1) - 0.02) < 1e-9


def test_a_run_against_itself_never_differs() -> None:
    values = RNG.lognormal(3, 1, 50)
    found = compare_paired(values, values)
    assert (found.verdict, found.different) == ("SAME", False)


def test_one_pair_is_undecided() -> None:
    found = compare_paired([1.0], [2.0])
    assert (found.verdict, found.ratio.value, found.ratio.low) == ("UNDECIDED", 2.0, None)


def test_clamped_components_take_the_ratio_of_means() -> None:
    baseline = np.array([0.0, *RNG.normal(10, 1, 39)])
    found = compare_paired(baseline, baseline * 2)
    assert found.verdict == "SLOWER"
    assert found.ratio.value == pytest.approx(2)
    assert compare_paired([0.0, 0.0], [1.0, 1.0]).verdict == "UNDECIDED"


def test_bad_input_is_told() -> None:
    with pytest.raises(UserError, match="baseline holds 1 NaN"):
        compare_paired([np.nan, 1.0], [1.0, 1.0])
    with pytest.raises(UserError, match="baseline has 2 values and candidate 1"):
        compare_paired([1.0, 2.0], [1.0])
    with pytest.raises(UserError, match=r"margin 2 found; expected a share such as 0\.02"):
        compare_paired([1.0, 2.0], [1.0, 2.0], margin=2)


@pytest.mark.parametrize("n_pairs", [20, 50])
@pytest.mark.parametrize("noise", ["lognormal", "student", "spikes"])
def test_false_alarms_stay_near_nominal(n_pairs: int, noise: str) -> None:
    rng = np.random.default_rng(n_pairs)
    size = (1_000, 2, n_pairs)
    logs = {
        "lognormal": lambda: rng.normal(0, 0.05, size),
        "student": lambda: 0.02 * rng.standard_t(3, size),
        "spikes": lambda: rng.normal(0, 0.01, size) + 0.4 * (rng.random(size) < 0.05),
    }[noise]()
    found = a_a_false_alarms(np.exp(3 + logs))
    # Rare spikes in 20 pairs make the interval longer than it need be, never shorter.
    assert (0 if noise == "spikes" else 0.02) <= found.share.value <= 0.09
    assert found.share.low <= found.share.value <= found.share.high
    assert (found.n_comparisons, found.nominal) == (1_000, 0.05)


def test_no_comparisons_are_refused() -> None:
    with pytest.raises(UserError, match="no comparisons"):
        a_a_false_alarms([])


def table(ratio: float = 1.0, seed: int = 0, **columns: object) -> pd.DataFrame:
    """Return two runs of each of 60 requests over 20 images."""
    request = np.repeat(np.arange(60), 2)
    work = np.random.default_rng(99).lognormal(3, 0.5, 60)[request]
    noise = np.random.default_rng(seed).lognormal(0, 0.01, 120)
    data = {
        "request_id": [f"r{i}" for i in request],
        "image_id": request // 3,
        "model": "tiny",
        "num_crops": 1 + request % 5,
        "num_vision_tokens": 144 * (1 + request % 5),
        "num_output_tokens": 1 + request % 3,
        "T_total": work * noise * ratio,
        "T_LLM_decode": 0.5 * work * noise,
        "T_projector": np.nan,
    }
    return pd.DataFrame(data | columns)


def test_tables_by_request() -> None:
    found = compare_tables(table(), table(1.1, 1))
    assert found.matched_by == ("request_id",)
    assert (found.n_matched, found.verdict) == (60, "SLOWER")
    assert found.components["T_total"].ratio.low < 1.1 < found.components["T_total"].ratio.high
    assert "20 clusters" in found.components["T_total"].ratio.method
    assert found.components["T_LLM_decode"].verdict == "SAME"
    assert "T_projector" in found.not_measured and "T_other" in found.not_measured
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_table_against_itself_is_the_same() -> None:
    found = compare_tables(table(), table().sample(frac=1, random_state=0))
    assert {c.verdict for c in found.components.values()} == {"SAME"}
    assert found.components["T_total"].ratio.value == pytest.approx(1)


def test_runs_of_a_request_are_averaged_first() -> None:
    before = pd.DataFrame({"request_id": ["a", "a", "b"], "T_total": [1.0, 3.0, 4.0]})
    after = pd.DataFrame({"request_id": ["a", "b", "b"], "T_total": [2.0, 3.0, 5.0]})
    assert compare_tables(before, after).components["T_total"].ratio.value == pytest.approx(1)


def test_unmatched_and_unmeasured_requests_are_listed() -> None:
    before, after = table(), table()
    after.loc[after["request_id"] == "r5", "T_total"] = np.nan
    found = compare_tables(before[before["request_id"] != "r3"], after[after["request_id"] != "r4"])
    assert (found.unmatched_baseline, found.unmatched_candidate) == (("r4",), ("r3",))
    assert "T_total: 1 matched requests not measured" in found.notes
    assert found.components["T_total"].n_pairs == 57


def test_pruned_tokens_are_matched_by_request_and_told() -> None:
    pruned = table(num_vision_tokens=72 * table()["num_crops"])
    found = compare_tables(table(), pruned)
    assert found.notes == ("60 of 60 matched requests differ in num_vision_tokens",)


def test_other_requests_are_matched_by_shape() -> None:
    other = table(request_id=[f"other{i}" for i in range(120)])
    found = compare_tables(table(), other)
    assert found.matched_by == ("num_crops", "num_vision_tokens", "num_output_tokens")
    assert (found.n_matched, found.verdict) == (15, "SAME")
    assert "no request in common: matched by shape" in found.notes


def test_patches_are_never_matched_with_tokens() -> None:
    seed = table(num_vision_tokens=576 * table()["num_crops"]).drop(columns="request_id")
    found = compare_tables(seed, table())
    assert found.matched_by == ("num_crops", "num_output_tokens")
    assert "counts patches" in found.notes[0]
    without_crops = seed.drop(columns="num_crops")
    assert "num_vision_tokens" in compare_tables(without_crops, without_crops).matched_by
    both = compare_tables(seed, seed)
    assert "num_vision_tokens" in both.matched_by


def test_prefill_only_requests_match_though_output_is_null() -> None:
    before = table(num_output_tokens=None).drop(columns="request_id")
    found = compare_tables(before, before)
    assert (found.n_matched, found.verdict) == (5, "SAME")


def test_records_with_missing_images_and_nullable_columns() -> None:
    typed = table(request_sha256="aa").assign(image_id=None)
    whole = ["image_id", "num_crops", "num_vision_tokens", "num_output_tokens"]
    typed = typed.astype({"request_id": "string", **dict.fromkeys(whole, "Int64")})
    changed = typed.assign(
        request_sha256=typed["request_sha256"].where(typed["request_id"] != "r7", "bb")
    )
    found = compare_tables(typed, changed)
    assert found.matched_by == ("request_id", "request_sha256")
    assert (found.unmatched_baseline, found.unmatched_candidate) == (("r7",), ("r7",))
    assert (found.n_matched, found.verdict) == (59, "SAME")
    assert found.components["T_total"].ratio.method == "t on log ratios"


def test_own_columns_to_match_by() -> None:
    found = compare_tables(table(), table(1.1, 1), match_by=["image_id", "num_crops"])
    assert found.n_matched == 60
    with pytest.raises(UserError, match="cannot match by grid"):
        compare_tables(table(), table(), match_by=["grid"])


def test_nothing_in_common_is_an_error() -> None:
    with pytest.raises(UserError, match="none of 1 and 1 requests match"):
        compare_tables(
            pd.DataFrame({"num_crops": [1], "T_total": [1.0]}),
            pd.DataFrame({"num_crops": [2], "T_total": [1.0]}),
        )
    with pytest.raises(UserError, match="neither request_id nor"):
        compare_tables(pd.DataFrame({"T_total": [1.0]}), pd.DataFrame({"T_total": [1.0]}))


def test_tokens_that_equal_the_patches_in_one_row_alone_are_tokens() -> None:
    shapes = {"num_crops": [1, 2, 3], "num_vision_tokens": [576, 700, 800]}
    baseline = pd.DataFrame({"request_id": list("abc"), **shapes, "T_total": [1.0, 2.0, 3.0]})
    candidate = baseline.tail(2).assign(request_id=["x", "y"])
    found = compare_tables(baseline, candidate, ["T_total"])
    assert found.n_matched == 2
    assert not any("counts patches" in note for note in found.notes)


@given(drawn=st.lists(st.tuples(st.floats(1, 1e3), st.floats(1, 1e3)), min_size=2, max_size=30))
def test_ratio_and_difference_are_on_the_same_side(drawn: list[tuple[float, float]]) -> None:
    before, after = zip(*drawn, strict=True)
    ratio, difference = compare_paired(before, after).ratio, paired_difference(before, after)
    assert (ratio.value - 1) * difference.value >= -1e-9


def test_an_additive_difference_is_narrow_though_levels_vary() -> None:
    rng = np.random.default_rng(0)
    before = rng.uniform(90, 110, 200)  # ± 20 ms, were they not pairs
    found = paired_difference(before, before + 20 + rng.normal(0, 1, 200))
    assert found.low <= 20 <= found.high
    assert found.high - found.low < 0.5
