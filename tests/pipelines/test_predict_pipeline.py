"""Predictions from sweeps whose law is known: every option counts, and the result says which."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from vlm_latency.errors import UserError
from vlm_latency.models import ModelHandle
from vlm_latency.options import ModelOptions, Options
from vlm_latency.pipelines.predict.nodes import predict

SIZES = [(224 * k + 112, 336) for k in range(1, 5)]
CEILINGS = {"flops_per_s": 5e10, "bytes_per_s": 1e10, "launch_overhead_us": 2.0, "dtype": "float32"}


@pytest.fixture(scope="module")
def measured() -> tuple[dict[str, Any], dict[str, Any]]:
    """What exp3 and exp4 would say if every part took three times what it takes at the ceiling."""
    from vlm_latency.costs import CostModel, Hardware, RequestShape
    from vlm_latency.costs.table import cost_columns
    from vlm_latency.models import describe
    from vlm_latency.records import COST_TIMES

    costs = CostModel(describe(ModelOptions(name="tiny-molmo")))
    rows = [(size, 1) for size in SIZES] + [(SIZES[2], n) for n in (4, 16, 64)]
    images = [costs.architecture.image_tokens(*size) for size, _ in rows]
    table = pd.DataFrame(
        {
            "image_width": [width for (width, _), _ in rows],
            "image_height": 336,
            "num_total_tokens": [image.num_total_tokens + 9 for image in images],
            "num_vision_tokens": [image.num_vision_tokens for image in images],
            "num_crops": [image.num_crops for image in images],
            "num_vision_patches": [image.num_vision_patches for image in images],
            "num_output_tokens": [n for _, n in rows],
        }
    )
    columns = cost_columns(
        costs,
        RequestShape.of_table(table),
        estimator="analytic",
        counted=False,
        hardware=Hardware.from_ceilings(CEILINGS),
        dtype="float32",
    )
    table = table.join(pd.DataFrame(columns))
    for part, time in COST_TIMES.items():
        table[time] = 3 * table[f"roofline_ms_{part}"]
    table["T_other"] = 1.0
    table["T_total"] = table[[*COST_TIMES.values(), "T_other"]].sum(axis=1)
    about = {"ceilings": CEILINGS, "environment": {"model": {"name": "m", "dtype": "float32"}}}
    return (
        {**about, "results": table[: len(SIZES)].to_dict("records")},
        {**about, "results": table[len(SIZES) :].to_dict("records")},
    )


def predicted(measured: Any, name: str = "tiny-molmo", dtype: str = "auto", **asked: Any) -> Any:
    parameters = {"model": {"name": name, "dtype": dtype}, "predict": asked}
    model = ModelHandle(ModelOptions.model_validate(parameters["model"]))
    return predict(Options.from_parameters(parameters), model, *measured)[0]


@pytest.mark.parametrize(
    "asked",
    [
        {"image": "336x336"},
        {"prompt_tokens": 500},
        {"output_tokens": 200},
        {"hardware": "H100"},
        {"name": "small-molmo"},
    ],
)
def test_every_option_of_a_workload_has_an_effect(measured: Any, asked: dict[str, Any]) -> None:
    base, other = (predicted(measured, **options) for options in ({}, asked))
    assert other["statistics"]["latency"].value != base["statistics"]["latency"].value
    assert "no interval: an interval needs 19 shapes, found 7" in base["statistics"]["notes"]


def test_another_type_of_weights_is_predicted_and_said(measured: Any) -> None:
    auto, narrow = (
        predicted(measured, "molmo-7b-d", dtype, hardware="H100", output_tokens=64)["statistics"]
        for dtype in ("auto", "bfloat16")
    )
    assert (auto["dtype"], narrow["dtype"]) == ("float32", "bfloat16")
    assert narrow["latency"].value < auto["latency"].value
    assert not any("asked for float32" in note for note in auto["notes"])
    assert any("calibrated in float32, asked for bfloat16" in note for note in narrow["notes"])


def test_pruning_and_grid_are_what_was_asked_for(measured: Any) -> None:
    found = predicted(
        measured, keep=(0.5,), drop_layer=3, vision_token_grid=(10, 20), output_token_grid=(2,)
    )
    assert found["pruning"][-1]["place"] == "at decoder layer 3"
    assert {row["keep"] for row in found["pruning"]} == {0.5}
    assert [row["num_vision_tokens"] for row in found["grid"]] == [10, 20]
    with pytest.raises(UserError, match=r"found drop_layer 9; expected 1 … 3"):
        predicted(measured, drop_layer=9)
    with pytest.raises(UserError, match="expected width x height"):
        predicted(measured, image="wide")


def test_the_finding_says_what_takes_how_long_and_how_far_it_was_extended(measured: Any) -> None:
    inside, outside = (predicted(measured, output_tokens=n)["finding"] for n in (4, 4000))
    assert inside.startswith("640x480 image, 16 prompt tokens, 4 output tokens: ")
    assert "ms (no interval) predicted without running it" in inside
    assert outside.endswith(", an extrapolation")
