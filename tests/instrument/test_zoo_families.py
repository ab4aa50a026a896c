"""The code that experiments use, on tiny twins of real families: loaded, prepared, measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vlm_latency.instrument.protocol import measure
from vlm_latency.instrument.session import SessionLog
from vlm_latency.models import load
from vlm_latency.options import MeasurementOptions, ModelOptions
from vlm_latency.records import COMPONENTS, MEASURED_COLUMNS, measured_table
from vlm_latency.vqa import image_bytes, sweep_sizes_requests

TWINS = ("tiny-molmo", "tiny-qwen3-vl", "tiny-llava")


@pytest.fixture(scope="module", params=TWINS)
def twin(request: pytest.FixtureRequest) -> Any:
    return load(ModelOptions(name=request.param, device="cpu"))


@pytest.mark.parametrize("method", ["timeline", "subtraction"])
def test_a_family_is_measured(twin: Any, method: str) -> None:
    requests = sweep_sizes_requests([(336, 336), (448, 336)]).assign(output_length=["4", "none"])
    options = MeasurementOptions(
        method=method, order="blocks", warmup="plateau", warmup_runs=1, warmup_max_runs=2
    )
    log = SessionLog()
    rows = [
        row
        for chunk in measure(
            twin,
            requests,
            options,
            fetch=lambda row: image_bytes(row, None),
            log=log,
            progress=False,
        )
        for row in chunk
    ]
    table = measured_table(rows).set_index("output_length")
    assert (table["status"] == "ok").all(), table["error"].tolist()
    assert set(table.columns) <= set(MEASURED_COLUMNS)
    assert table["num_output_tokens"].to_dict() == {"4": 4, "none": 1}
    assert table["T_LLM_decode"]["none"] == 0
    assert (table["T_preprocess"] > 0).all()
    total = table[["T_vision_total", "T_LLM_prefill", "T_LLM_decode", "T_other"]].sum(axis=1)
    assert np.allclose(total, table["T_total"], atol=1e-9)
    tokens = table["num_vision_tokens"] + table["num_language_tokens"]
    assert (tokens == table["num_total_tokens"]).all()
    assert log.failures == 0
    if method == "timeline":
        assert (table[list(COMPONENTS)] >= 0).all(axis=None)
        assert len(table["decode_step_ms"]["4"]) == 3
        vision = table["T_vision_encoder"] + table["T_projector"]
        assert np.allclose(vision, table["T_vision_total"], atol=1e-9)
    kept = twin.architecture.kv_bytes_per_token("float32")
    positions = table["num_total_tokens"] + table["num_output_tokens"] - 1
    assert (table["kv_cache_bytes"] == kept * positions).all()
