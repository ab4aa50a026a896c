"""exp6 on the tiny model: every method beside the model as it is, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from vlm_latency.errors import UserError
from vlm_latency.models.handle import ModelHandle
from vlm_latency.options import Options
from vlm_latency.pipelines.data_sampling.rules import reductions
from vlm_latency.reduction import METHODS


def ways(**given: Any) -> list[tuple[str, str, float]]:
    options = Options.from_parameters({"model": {"name": "tiny-molmo", "device": "cpu"}, **given})
    return reductions(options.experiment("exp6"), ModelHandle(options.model))


def test_every_method_and_share_is_beside_the_baseline() -> None:
    found = ways(exp6={"keep": "0.5 0.25"})
    assert found[:2] == [("baseline", "baseline", 1.0), ("identity", "identity", 1.0)]
    assert len(found) == 2 + 2 * (len(METHODS) - 1)


def test_a_method_that_the_engine_cannot_run_is_left_out_or_refused() -> None:
    static = {"name": "tiny-molmo", "device": "cpu", "engine": "static"}
    assert "llm-attention" not in {name for _, name, _ in ways(model=static)}
    with pytest.raises(UserError, match="engine=static cannot run the method llm-attention"):
        ways(model=static, exp6={"methods": "llm-attention"})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": {"name": "null-model"}}, "needs a model with vision tokens"),
        ({"exp6": {"measurement": {"method": "subtraction"}}}, "method=subtraction"),
        ({"exp6": {"methods": "nothing"}}, "found method 'nothing'"),
        ({"exp6": {"keep": "0"}}, "exp6.keep"),
    ],
)
def test_what_cannot_be_measured_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ways(**given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, kedro_run: Callable[..., Any]) -> Path:
    root = tmp_path_factory.mktemp("exp6")
    given = {
        "exp6.methods": "random llm-attention pixels",
        "exp6.keep": "0.25",
        "calibration.ceiling_seconds": 0.1,
    }
    kedro_run("exp6", root, given)
    return root / "exp6"


def test_the_result_says_what_was_claimed_and_what_was_measured(folder: Path) -> None:
    result = json.loads((folder / "exp6_token_reduction.json").read_text())
    entries = {entry["method"]: entry for entry in result["results"]}
    assert set(entries) == {"identity", "random", "llm-attention", "pixels"}
    identity = entries["identity"]
    assert identity["claimed"]["speed_up"] == 1 and identity["claimed"]["flops_ratio"] == 1
    assert identity["realised"] is None  # nothing was saved
    random, layer = entries["random"], entries["llm-attention"]
    assert random["tokens"]["value"] == 0.25 * random["tokens_before"]["value"]
    assert 1 < layer["claimed"]["speed_up"] < random["claimed"]["speed_up"]
    assert random["kv_cache_bytes"] < layer["kv_cache_bytes"] < identity["kv_cache_bytes"]
    assert entries["pixels"]["T_reduction"] is None and random["T_reduction"]["value"] > 0
    for entry in entries.values():
        total = entry["measured"]["T_total"]
        assert total["verdict"] in ("FASTER", "SLOWER", "SAME", "UNDECIDED")
        assert entry["accuracy"]["value"] is None  # the weights are random
    (claim,) = result["claims"]
    assert claim["name"] == "flops_become_time"
    judged, alone = claim["numbers"]["random@0.25"], random["realised"]
    assert judged["level"] == pytest.approx(1 - 0.05 / len(claim["numbers"]))
    assert judged["value"] == alone["value"]
    assert judged["low"] < alone["low"] and judged["high"] > alone["high"]  # all hold together


def test_records_table_and_figure_are_there(folder: Path) -> None:
    records = pd.read_parquet(folder / "exp6_records.parquet")
    assert (records["status"] == "ok").all()
    assert set(records["method"]) == {"baseline", "identity", "random", "llm-attention", "pixels"}
    parts = ["T_vision_total", "T_LLM_prefill", "T_LLM_decode", "T_other", "T_reduction"]
    assert records[parts].sum(axis=1).to_numpy() == pytest.approx(records["T_total"].to_numpy())
    assert "claimed speed-up" in (folder / "tables" / "paper.tex").read_text()
    assert (folder / "figures" / "exp6_token_reduction.png").exists()
