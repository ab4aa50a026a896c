"""Predictors against latencies of which the law is known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from vlm_latency.costs import PARTS, CostModel, Hardware, RequestShape
from vlm_latency.costs.prediction import (
    Predictor,
    calibrate_predictor,
    predictors,
    roofline_terms,
    shapes,
)
from vlm_latency.costs.table import cost_columns
from vlm_latency.costs.workload import (
    latency_grid,
    predict_workload,
    pruning_table,
    workload_columns,
)
from vlm_latency.errors import UserError
from vlm_latency.statistics import Estimate, cross_validate

MACHINE = Hardware.from_ceilings(
    {"flops_per_s": 1e9, "bytes_per_s": 1e9, "launch_overhead_us": 2.0}
)
TIMES = ("T_vision_encoder", "T_projector", "T_LLM_prefill", "T_LLM_decode", "T_other")


@pytest.fixture(scope="module")
def entries(by_hand: CostModel) -> pd.DataFrame:
    """A vision sweep and a language sweep; each part at its own share of the ceilings."""
    crops = [1, 2, 3, 4, 5, 6, 7, 8, *[3] * 7]
    outputs = [*[1] * 8, 2, 4, 8, 16, 32, 64, 128]
    table = pd.DataFrame({"num_crops": crops, "num_output_tokens": outputs})
    table["image_width"] = table["image_height"] = 28
    table["num_vision_patches"] = table["num_vision_tokens"] = 4 * table["num_crops"]
    table["num_total_tokens"] = table["num_vision_tokens"] + 9
    columns = cost_columns(
        by_hand,
        RequestShape.of_table(table),
        estimator="analytic",
        counted=False,
        hardware=MACHINE,
        dtype="float32",
    )
    table = table.join(pd.DataFrame(columns))
    terms = roofline_terms(table, MACHINE, "float32")
    table["T_vision_encoder"] = 3 * terms["vision", "compute"] + terms["vision", "launch"]
    table["T_projector"] = 5 * terms["projector", "memory"]
    table["T_LLM_prefill"] = 2 * terms["llm_prefill", "compute"] + terms["llm_prefill", "launch"]
    table["T_LLM_decode"] = 4 * terms["llm_decode", "memory"] + 1.5 * terms["llm_decode", "launch"]
    table["T_other"] = 0.3 + 0.02 * terms["other", "step"]
    table["T_total"] = table[list(TIMES)].sum(axis=1)
    return table


@pytest.fixture(scope="module")
def predictor(entries: pd.DataFrame) -> Predictor:
    return calibrate_predictor(entries, MACHINE, "float32")


def test_calibration_finds_the_law(entries: pd.DataFrame, predictor: Predictor) -> None:
    assert predictor.num_shapes == 15
    assert predictor.median_error == pytest.approx(0, abs=1e-6)
    predicted = predictor.predict(entries)
    for column in (*TIMES, "T_total"):
        np.testing.assert_allclose(predicted[column], entries[column], rtol=1e-6, atol=1e-9)


def test_four_predictors_held_out(entries: pd.DataFrame) -> None:
    found = predictors(entries, MACHINE, "float32")
    assert list(found) == ["flops", "tokens", "roofline_nominal", "roofline_calibrated"]
    errors = cross_validate(range(len(entries)), found, entries["T_total"]).mape
    assert errors["roofline_calibrated"].value == pytest.approx(0, abs=1e-6)
    assert errors["flops"].value > 0.02
    assert errors["roofline_nominal"].value > 0.3
    # a total is enough, where parts were not measured
    total = predictors(entries.drop(columns=["T_other"]), MACHINE, "float32")
    errors = cross_validate(range(len(entries)), total, entries["T_total"]).mape
    assert errors["roofline_calibrated"].value < 0.02


def test_measured_parts_are_not_predicted_from(entries: pd.DataFrame) -> None:
    X, fit = predictors(entries, MACHINE, "float32")["roofline_calibrated"]
    fitted = fit(X, entries["T_total"].to_numpy())
    blind = X.copy()
    blind[:, -len(TIMES) :] = 0
    np.testing.assert_array_equal(fitted.predict(X), fitted.predict(blind))


def test_results_of_others_have_no_roofline(entries: pd.DataFrame) -> None:
    bare = entries[["num_vision_tokens", "num_total_tokens", "num_output_tokens", "flops_total"]]
    assert list(predictors(bare, MACHINE, "float32")) == ["flops", "tokens"]


def test_noise_widens_the_interval(entries: pd.DataFrame) -> None:
    assert calibrate_predictor(entries, MACHINE, "float32").interval.note == (
        "an interval needs 19 shapes, found 15"
    )
    longer = entries.assign(num_total_tokens=2 * entries["num_total_tokens"])
    noisy = pd.concat([entries, longer] * 2, ignore_index=True)
    factor = np.exp(np.random.default_rng(0).normal(0, 0.1, len(noisy)))
    noisy[[*TIMES, "T_total"]] = noisy[[*TIMES, "T_total"]].mul(factor, axis=0)
    found = calibrate_predictor(noisy, MACHINE, "float32")
    assert found.num_shapes == 30
    assert 0.6 < found.interval.low < 0.95
    assert 1.05 < found.interval.high < 1.6
    assert "one request" in found.interval.method
    predicted = found.predict(noisy)
    inside = noisy["T_total"].between(predicted["T_total_low"], predicted["T_total_high"])
    assert inside.mean() > 0.9


def test_near_twins_are_one_shape() -> None:
    table = pd.DataFrame(
        {
            "num_crops": 7,
            "num_vision_tokens": 704,
            "num_total_tokens": [760, 755, 757, 900, 755],
            "num_output_tokens": [8, 8, 8, 8, 16],
        }
    )
    assert shapes(table).tolist() == [0, 0, 0, 1, 2]
    assert shapes(table.drop(columns="num_total_tokens")).tolist() == [0, 0, 0, 0, 1]


def test_what_a_calibration_needs(entries: pd.DataFrame) -> None:
    with pytest.raises(UserError, match="2 shapes with the times of all parts found"):
        calibrate_predictor(entries.head(2), MACHINE, "float32")
    with pytest.raises(UserError, match="no columns T_other found"):
        calibrate_predictor(entries.drop(columns="T_other"), MACHINE, "float32")
    with pytest.raises(UserError, match="no columns bytes_vision"):
        calibrate_predictor(entries.drop(columns="bytes_vision"), MACHINE, "float32")


def test_a_workload_with_its_composition(by_hand: CostModel, predictor: Predictor) -> None:
    found = predict_workload(by_hand, predictor, 28, 28, 9, 5)
    assert found["num_vision_tokens"] == 4
    assert found["num_total_tokens"] == 13
    assert found["T_total"] == pytest.approx(sum(found[name] for name in TIMES))
    assert found["T_first_token"] == pytest.approx(found["T_total"] - found["T_LLM_decode"])
    assert found["T_total_low"] is None  # 15 shapes are too few
    unit = Estimate(1.0, 0.5, 2.0, 0.95, 60, "")
    bounded = predict_workload(by_hand, replace(predictor, interval=unit), 28, 28, 9, 5)
    assert bounded["T_total_low"] == pytest.approx(found["T_total"] / 2)
    assert set(found["binds"]) == set(PARTS)
    assert found["predicted_kv_cache_bytes"] == (13 + 4) * 2 * 2 * 8 * 4


def test_without_calibration_it_is_the_roofline(by_hand: CostModel) -> None:
    found = predict_workload(by_hand, Predictor(None, MACHINE, "float32"), 28, 28, 9, 5)
    shape = RequestShape(28, 28, 13, 4, 1, 4, 5)
    columns = cost_columns(
        by_hand, shape, estimator="analytic", counted=False, hardware=MACHINE, dtype="float32"
    )
    assert found["T_total"] == pytest.approx(float(columns["roofline_ms_total"]))
    assert found["T_total_low"] is None


def test_another_device_keeps_the_shares(by_hand: CostModel, predictor: Predictor) -> None:
    twice = Hardware.from_ceilings(
        {"flops_per_s": 2e9, "bytes_per_s": 2e9, "launch_overhead_us": 1.0}, name="twice"
    )
    here = predict_workload(by_hand, predictor, 28, 28, 9, 5)
    there = predict_workload(by_hand, predictor.on(twice), 28, 28, 9, 5)
    for name in TIMES[:-1]:
        assert there[name] == pytest.approx(here[name] / 2)
    assert predictor.on(twice).calibrated_on == "this machine"


def test_the_grid_agrees_with_single_workloads(by_hand: CostModel, predictor: Predictor) -> None:
    grid = latency_grid(by_hand, predictor, (28, 28), 9, (4, 16), (1, 5))
    assert grid[["num_vision_tokens", "num_output_tokens"]].to_numpy().tolist() == [
        [4, 1],
        [4, 5],
        [16, 1],
        [16, 5],
    ]
    one = predict_workload(by_hand, predictor, 28, 28, 9, 5)
    assert grid["T_total"][1] == pytest.approx(one["T_total"])
    assert (grid["T_total"].diff().iloc[[1, 3]] > 0).all()


def test_what_was_not_measured_is_marked(by_hand: CostModel, predictor: Predictor) -> None:
    """Measured were 4 … 32 vision tokens, 13 … 41 of the prompt, 1 … 128 written."""
    assert predictor.measured == {
        "num_vision_tokens": (4.0, 32.0),
        "num_total_tokens": (13.0, 41.0),
        "num_output_tokens": (1.0, 128.0),
    }
    grid = latency_grid(by_hand, predictor, (28, 28), 9, [4, 32, 33], [1, 128, 129])
    inside = ~grid.set_index(["num_vision_tokens", "num_output_tokens"])["extrapolated"]
    assert inside.loc[[4, 32], [1, 128]].all()
    assert not inside.loc[33].any()
    assert not inside.loc[:, 129].any()
    for prompt, outputs, beyond in ((9, 4, False), (8, 4, True), (38, 4, True), (9, 200, True)):
        found = predict_workload(by_hand, predictor, 28, 28, prompt, outputs)
        assert found["extrapolated"] is beyond
    pruned = pruning_table(by_hand, predictor, (28, 28), 9, 4, [1, 0.5], 1)
    assert pruned.groupby("keep")["extrapolated"].all().to_dict() == {0.5: True, 1.0: False}


def test_a_model_of_unknown_costs_is_not_predicted(
    by_hand: CostModel, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CostModel, "unknown", {"vision": "no rule for x"})
    monkeypatch.setattr(by_hand.architecture, "name", "odd", raising=False)
    with pytest.raises(UserError, match=r"no latency of odd can be predicted.* no rule for x"):
        predict_workload(by_hand, predictor, 28, 28, 9, 4)


def test_work_of_the_encoder_is_in_proportion_and_weights_are_not(by_hand: CostModel) -> None:
    table = workload_columns(by_hand, (28, 28), 9, [1, 1, 1], "float32", [4, 8, 0])
    weights = 4 * by_hand.census.vision.weights
    flops, moved = table["flops_vision"], table["bytes_vision"]
    assert flops[1] == 2 * flops[0]
    assert moved[1] - weights == 2 * (moved[0] - weights)
    assert flops[2] == 0
    assert moved[2] == weights


def test_pruning(by_hand: CostModel, predictor: Predictor) -> None:
    table = pruning_table(by_hand, predictor, (28, 28), 9, 5, (1.0, 0.5, 0.25), drop_layer=1)
    assert table["place"].unique().tolist() == [
        "before the encoder",
        "after the projector",
        "at decoder layer 1",
    ]
    assert table["num_vision_tokens"].tolist() == [4, 2, 1] * 3
    whole = predict_workload(by_hand, predictor, 28, 28, 9, 5)["T_total"]
    for _, rows in table.groupby("place"):
        assert rows["T_total"].iloc[0] == pytest.approx(whole)
        assert rows["speed_up"].is_monotonic_increasing
        np.testing.assert_allclose(rows["saved_ms"], whole - rows["T_total"])
    first, second, third = (
        rows.set_index("keep") for _, rows in table.groupby("place", sort=False)
    )
    # dropping earlier wins more, and after the projector the encoder is paid in full
    assert first["saved_ms"][0.25] > second["saved_ms"][0.25] > third["saved_ms"][0.25] > 0
    assert second["T_vision_encoder"][0.25] == second["T_vision_encoder"][1.0]
    # one of two layers sees all tokens: half of what dropping after the projector wins
    assert third["saved_ms"][0.5] == pytest.approx(second["saved_ms"][0.5] / 2)


def test_pruning_refuses_what_cannot_be(by_hand: CostModel, predictor: Predictor) -> None:
    with pytest.raises(UserError, match="expected shares above 0 and up to 1"):
        pruning_table(by_hand, predictor, (28, 28), 9, 5, (1.5,), 1)
    with pytest.raises(UserError, match=r"found drop_layer 2; expected 1 … 1"):
        pruning_table(by_hand, predictor, (28, 28), 9, 5, (0.5,), 2)
