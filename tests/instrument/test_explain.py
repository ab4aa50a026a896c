from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from vlm_latency.errors import MeasurementError
from vlm_latency.instrument.attribution import attribute, bound
from vlm_latency.instrument.explain import explain, profiled
from vlm_latency.instrument.injection import DELAYED, DeviceSleep, HostSpin, delayed
from vlm_latency.instrument.methods import make_meter
from vlm_latency.models import load
from vlm_latency.option_groups import ExplainOptions
from vlm_latency.options import ModelOptions
from vlm_latency.records import COMPONENTS
from vlm_latency.vqa import image_bytes, sweep_sizes_requests


def shares_of(meter: Any, prepared: Any, tokens: int = 3) -> tuple[Any, dict[str, float]]:
    trace, reading = profiled(meter, prepared, tokens)
    assert len(reading.token_ids) == tokens
    return attribute(trace["traceEvents"], meter.device.type == "cuda")


def test_the_operators_of_a_request_are_attributed(family: Any) -> None:
    vlm, prepared = family
    meter = make_meter(vlm)
    shares, total = shares_of(meter, prepared)
    assert meter.timeline.listener is None
    assert total["attributed"] > 0.9  # an operator after the request may be interrupted
    assert all(shares[name].kernels > 0 for name in COMPONENTS)
    assert shares["T_LLM_prefill"].attention == ["flash"]
    assert sum(share.work_ms for share in shares.values()) <= total["work_ms"]


@pytest.mark.parametrize("component", DELAYED)
def test_a_spin_of_the_host_is_no_work(llava: Any, component: str) -> None:
    """It is in the component's time on the host and in no operator."""
    vlm, prepared = llava
    meter = make_meter(vlm)
    plain, _ = shares_of(meter, prepared)
    spin = HostSpin()
    with delayed(vlm, component, 20.0, spin):
        trace, _ = profiled_once(meter, prepared)
    shares, _ = attribute(trace["traceEvents"], on_device=False)
    assert shares[component].host_ms >= spin.length_ms()
    for name in COMPONENTS:
        assert shares[name].kernels == plain[name].kernels


def profiled_once(meter: Any, prepared: Any) -> Any:
    """A delay happens once per context: in the first of the tries only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlm_latency.instrument.explain.TRIES", 1)
        return profiled(meter, prepared, 3)


def test_known_operators_are_counted_where_they_run(llava: Any) -> None:
    vlm, prepared = llava
    meter = make_meter(vlm)
    plain, _ = shares_of(meter, prepared)
    matrix = torch.eye(8)

    def work(*_: Any) -> None:
        for _ in range(5):
            torch.linalg.matrix_exp(matrix)

    handle = vlm.components.vision_encoder.register_forward_hook(work)
    shares, _ = shares_of(meter, prepared)
    handle.remove()
    more = {name: shares[name].kernels - plain[name].kernels for name in COMPONENTS}
    assert more.pop("T_vision_encoder") == 5
    assert not any(more.values())


def test_requests_are_explained() -> None:
    vlm = load(ModelOptions(name="tiny-llava", device="cpu"))
    requests = sweep_sizes_requests([(336, 336), (448, 336)])
    options = ExplainOptions(output_tokens=3, num_runs=2)
    rows, profiles, trace = explain(vlm, requests, options, lambda row: image_bytes(row, None))
    ids = requests["request_id"].tolist()
    assert sorted((row["request_id"], row["run_index"]) for row in rows) == sorted(
        (name, run) for name in ids for run in range(2)
    )
    assert [profile.request_id for profile in profiles] == ids
    for profile in profiles:
        assert profile.total["attributed"] > 0.9
        assert math.isfinite(profile.slowdown) and profile.slowdown > 0
    assert json.loads(json.dumps(trace)) == trace
    drawn = {event["pid"] for event in trace["traceEvents"] if event.get("cat") == "component"}
    assert drawn == {f"components {name}" for name in ids}


def test_the_null_model_has_nothing_to_explain() -> None:
    with pytest.raises(MeasurementError, match=r"found model\.name=null-model"):
        explain(
            load(ModelOptions(name="null-model")), pd.DataFrame(), ExplainOptions(), lambda _: b""
        )


@pytest.fixture
def on_gpu(llava: Any) -> Any:
    vlm, prepared = llava
    vlm.device = torch.device("cuda", 0)
    vlm.model.to(vlm.device)
    placed = SimpleNamespace(inputs={k: v.to(vlm.device) for k, v in prepared.inputs.items()})
    meter = make_meter(vlm)
    meter(placed, 3)
    return vlm, meter, placed


@pytest.mark.gpu
def test_known_device_work_comes_back_on_a_gpu(on_gpu: Any) -> None:
    vlm, meter, prepared = on_gpu
    plain, total = shares_of(meter, prepared)
    assert total["attributed"] >= 0.99
    sleep = DeviceSleep(vlm.device)
    for component in DELAYED:
        with delayed(vlm, component, 50.0, sleep):
            trace, _ = profiled_once(meter, prepared)
        shares, total = attribute(trace["traceEvents"], on_device=True)
        assert total["attributed"] >= 0.99
        grown = shares[component].busy_ms - plain[component].busy_ms
        assert grown == pytest.approx(sleep.length_ms(), rel=0.02)


@pytest.mark.gpu
def test_a_launch_bound_model_is_told_from_a_memory_bound_one_on_a_gpu(on_gpu: Any) -> None:
    vlm, meter, prepared = on_gpu
    wall_ms = meter(prepared, 3).times["T_LLM_prefill"]
    shares, _ = shares_of(meter, prepared)
    assert bound(wall_ms, shares["T_LLM_prefill"].busy_ms, 1e-6, 1e-5) == "launches"
    source = torch.ones(2**28, device=vlm.device)
    target = torch.empty_like(source)

    def copy(*_: Any) -> None:
        for _turn in range(40):  # some 0.7 ms each: far more than what the layers take to launch
            target.copy_(source)

    handle = vlm.components.language_model.register_forward_hook(copy)
    meter(prepared, 3)
    wall_ms = meter(prepared, 3).times["T_LLM_prefill"]
    shares, _ = shares_of(meter, prepared)
    handle.remove()
    assert bound(wall_ms, shares["T_LLM_prefill"].busy_ms, 1e-6, 0.5) == "memory"
