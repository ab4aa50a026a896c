"""Costs as columns of records."""

import logging

import numpy as np
import pandas as pd
import pytest

from vlm_latency.costs import PARTS, CostModel, RequestShape, add_costs
from vlm_latency.errors import UserError

CEILINGS = {"flops_per_s": 1e9, "bytes_per_s": 1e8, "launch_overhead_us": 2.0}


def runs(n: int = 3) -> pd.DataFrame:
    rows = {
        "request_id": [f"r{i}" for i in range(n)],
        "image_width": 28,
        "image_height": 28,
        "num_total_tokens": [7 + i for i in range(n)],
        "num_vision_tokens": 4,
        "num_crops": 1,
        "num_vision_patches": 4,
        "num_output_tokens": [1 + i for i in range(n)],
        "T_total": 10.0,
        "T_vision_encoder": 4.0,
        "T_LLM_prefill": 5.0,
        "T_LLM_decode": [0.0, *([1.0] * (n - 1))],
        "T_projector": 1.0,
    }
    counts = {name: "Int64" for name in rows if name.startswith(("num_", "image_"))}
    return pd.DataFrame(rows).astype(counts)


def test_every_column_and_every_estimator(by_hand: CostModel) -> None:
    table = add_costs(runs(), by_hand.architecture, hardware=CEILINGS, dtype="float32")
    for i, shape in enumerate(RequestShape.of_table(runs())):
        for suffix, estimator in (
            ("", "analytic"),
            ("_analytic", "analytic"),
            ("_counted", "counted"),
            ("_analytic_causal", "analytic_causal"),
            ("_rule", "rule"),
        ):
            for part, flops in by_hand.flops(shape, estimator).items():
                assert table[f"flops_{part}{suffix}"][i] == flops
        for part, moved in by_hand.bytes_moved(shape, "float32").items():
            assert table[f"bytes_{part}"][i] == moved
    assert table["flops_total"].dtype == table["bytes_total"].dtype == "Int64"
    assert list(table.columns[:3]) == ["request_id", "image_width", "image_height"]


def test_roofline_and_shares_of_the_peak(by_hand: CostModel) -> None:
    table = add_costs(runs(), by_hand.architecture, hardware=CEILINGS, dtype="float32")
    for part in PARTS:
        compute = table[f"flops_{part}"].astype(float) / 1e9 * 1e3
        memory = table[f"bytes_{part}"].astype(float) / 1e8 * 1e3
        launch = table[f"launches_{part}"].astype(float) * 2e-3
        np.testing.assert_allclose(
            table[f"roofline_ms_{part}"], np.maximum(compute, memory) + launch
        )
        sides = np.stack([compute, memory, launch])
        names = np.array(["compute", "memory", "launch"])
        runs_at_all = sides.max(axis=0) > 0
        assert (
            table.loc[runs_at_all, f"roofline_bound_{part}"]
            == names[sides.argmax(axis=0)][runs_at_all]
        ).all()
    total = sum(table[f"roofline_ms_{part}"] for part in PARTS)
    np.testing.assert_allclose(table["roofline_ms_total"], total)
    assert table["roofline_bound_llm_decode"].isna().tolist() == [True, False, False]
    # 4 ms at 1 GFLOP/s would be 4 MFLOP
    np.testing.assert_allclose(table["mfu_vision"], table["flops_vision"].astype(float) / 4e6)
    np.testing.assert_allclose(table["mbu_total"], table["bytes_total"].astype(float) / 1e6)
    assert np.isnan(table["mfu_llm_decode"][0])
    assert np.isnan(table["arithmetic_intensity_llm_decode"][0])


def test_the_chosen_estimator_fills_the_seeds_columns(by_hand: CostModel) -> None:
    for estimator, suffix in (("parameter_rule", "_rule"), ("counted", "_counted")):
        table = add_costs(
            runs(), by_hand.architecture, estimator=estimator, counted=False, dtype="float32"
        )
        for part in (*PARTS, "total"):
            assert (table[f"flops_{part}"] == table[f"flops_{part}{suffix}"]).all()
    # utilisation is of the work really done, whatever fills flops_*
    rule = add_costs(
        runs(),
        by_hand.architecture,
        estimator="parameter_rule",
        hardware=CEILINGS,
        dtype="float32",
    )
    exact = add_costs(runs(), by_hand.architecture, hardware=CEILINGS, dtype="float32")
    pd.testing.assert_series_equal(rule["mfu_total"], exact["mfu_total"])


def test_failed_runs_have_no_costs(by_hand: CostModel) -> None:
    records = runs()
    records.loc[1, ["num_total_tokens", "num_output_tokens"]] = pd.NA
    table = add_costs(records, by_hand.architecture, hardware="H100", dtype="bfloat16")
    assert table["flops_total"].isna().tolist() == [False, True, False]
    assert table["roofline_ms_total"].isna().tolist() == [False, True, False]
    assert table.index.equals(records.index)


def test_no_records(by_hand: CostModel) -> None:
    table = add_costs(runs().iloc[:0], by_hand.architecture, hardware=CEILINGS, dtype="float32")
    assert len(table) == 0
    assert "flops_total_counted" in table


def test_without_hardware_there_is_no_roofline(by_hand: CostModel) -> None:
    table = add_costs(runs(), by_hand.architecture, dtype="float32")
    assert not [name for name in table if name.startswith(("roofline", "mfu", "mbu"))]


def test_many_records_of_few_shapes(by_hand: CostModel) -> None:
    few = runs(40)
    many = pd.concat([few] * 500, ignore_index=True)
    table = add_costs(many, by_hand.architecture, hardware=CEILINGS, dtype="float32")
    once = add_costs(few, by_hand.architecture, hardware=CEILINGS, dtype="float32")
    assert len(table) == 20_000
    pd.testing.assert_frame_equal(table.iloc[-40:].reset_index(drop=True), once)


def test_a_model_that_does_not_run_on_shapes(
    by_hand: CostModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise NotImplementedError("needs numbers")

    monkeypatch.setattr("vlm_latency.costs.counted.Counter.vision", refuse)
    with caplog.at_level(logging.WARNING):
        table = add_costs(runs(), by_hand.architecture, hardware=CEILINGS, dtype="float32")
    assert "needs numbers" in caplog.text
    assert table["flops_total_counted"].isna().all()
    assert table["flops_total"].notna().all()
    assert table["roofline_ms_total"].notna().all()


def test_a_difference_is_told(
    by_hand: CostModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = CostModel.flops

    def wrong(self: CostModel, shape: RequestShape, estimator: str = "analytic") -> dict:
        found = exact(self, shape, estimator)
        return {**found, "vision": found["vision"] + 6} if estimator == "counted" else found

    monkeypatch.setattr(CostModel, "flops", wrong)
    with caplog.at_level(logging.WARNING):
        add_costs(runs(), by_hand.architecture, dtype="float32")
    assert "vision: counted FLOPs differ from analytic ones by up to 6" in caplog.text


def test_quicker_than_the_machine_can_be_is_marked(by_hand: CostModel) -> None:
    """Cached image features: the encoder's time is gone, its work is not."""
    records = runs()
    records.loc[1, "T_vision_encoder"] = 1e-3
    table = add_costs(records, by_hand.architecture, hardware=CEILINGS, dtype="float32")
    assert table["mfu_vision"][1] > 20
    assert table["costs_note"].isna().tolist() == [True, False, True]
    assert "vision: above 125% of what the machine can do" in table["costs_note"][1]


def test_the_null_model_costs_nothing() -> None:
    from vlm_latency.models import describe
    from vlm_latency.options import ModelOptions

    table = add_costs(
        runs(), describe(ModelOptions(name="null-model")), hardware=CEILINGS, dtype="float32"
    )
    zero = [name for name in table if name.startswith(("flops_", "bytes_", "launches_", "pred"))]
    assert len(zero) > 30
    assert (table[zero] == 0).all(axis=None)
    assert (table["roofline_ms_total"] == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"estimator": "guess", "dtype": "float32"}, "found flops.estimator 'guess'"),
        ({"dtype": "int8"}, "found dtype 'int8'; expected one of float32, bfloat16, float16"),
        ({"dtype": "float32", "hardware": "abacus"}, "found hardware 'abacus'; expected one of H"),
    ],
)
def test_what_a_user_gets_wrong(by_hand: CostModel, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_costs(runs(), by_hand.architecture, **arguments)


def test_every_cost_is_a_column_of_the_record() -> None:
    from vlm_latency.models import describe
    from vlm_latency.options import ModelOptions
    from vlm_latency.records import COST_COLUMNS, MEASURED_COLUMNS, measured_table

    counts = {"num_crops": 2, "num_vision_patches": 8, "num_vision_tokens": 8}
    row = {**counts, "num_total_tokens": 20, "num_output_tokens": 3, "order_index": 0}
    table = measured_table([row])
    ceilings = {"flops_per_s": 1e12, "bytes_per_s": 1e11, "launch_overhead_us": 5.0}
    architecture = describe(ModelOptions(name="tiny-llava"))
    costs = add_costs(table, architecture, hardware=ceilings, dtype="float32", counted=False)
    assert set(costs) - set(MEASURED_COLUMNS) <= set(COST_COLUMNS)
