from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from vlm_latency.errors import MeasurementError, ModelError
from vlm_latency.instrument import graphs
from vlm_latency.instrument.clock import HostClock
from vlm_latency.instrument.meter import Meter, quiet
from vlm_latency.instrument.methods import (
    METERS,
    SubtractionMeter,
    TimelineMeter,
    make_meter,
)
from vlm_latency.instrument.timeline import Timeline
from vlm_latency.models.boundaries import blocks_of
from vlm_latency.options import COMPILED
from vlm_latency.records import COMPONENTS, TIME_COLUMNS

ENGINES = ("eager", "static")


def state(model: nn.Module) -> dict[str, Any]:
    """Everything an instrument could leave behind on a model."""
    return {
        name: (
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            {key for key in vars(module) if callable(vars(module)[key])},
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("engine", ENGINES)
def test_timeline_partitions_every_family(family: Any, engine: str) -> None:
    vlm, prepared = family
    with make_meter(vlm, "timeline", engine) as meter:
        reading = meter(prepared, 5)
        _, bare_tokens = meter.bare(prepared, 5)
    times = reading.times
    assert set(times) == {*TIME_COLUMNS} - {"T_preprocess"}
    assert reading.token_ids == bare_tokens
    assert len(reading.token_ids) == 5
    assert len(times["decode_step_ms"]) == 4
    assert min(times["decode_step_ms"]) > 0
    assert sum(times["decode_step_ms"]) == pytest.approx(times["T_LLM_decode"], abs=1e-9)
    assert times["T_first_decode_step"] == times["decode_step_ms"][0]
    parts = times["T_LLM_decode_forward"] + times["T_LLM_decode_between"]
    assert parts == pytest.approx(times["T_LLM_decode"], abs=1e-9)
    assert min(times["T_LLM_decode_forward"], times["T_LLM_decode_between"]) > 0
    assert all(times[name] >= 0 for name in COMPONENTS)
    assert times["T_vision_encoder"] > 0
    assert times["T_projector"] > 0
    assert sum(times[name] for name in COMPONENTS) == pytest.approx(times["T_total"], abs=1e-9)
    vision = times["T_vision_encoder"] + times["T_projector"]
    assert vision == pytest.approx(times["T_vision_total"], abs=1e-9)
    assert times["T_first_token"] < times["T_total"]
    assert times["T_per_output_token"] == pytest.approx(times["T_LLM_decode"] / 4)
    assert all(times[name] is None for name in times if name.endswith("_host"))


@pytest.mark.parametrize("method", METERS)
def test_prefill_only_is_one_forward(llava: Any, method: str) -> None:
    vlm, prepared = llava
    reading = make_meter(vlm, method)(prepared, 1)
    assert len(reading.token_ids) == 1
    assert reading.times["T_LLM_decode"] == 0
    assert reading.times["T_per_output_token"] is None
    assert reading.times["raw_T_LLM_decode"] is None


@pytest.mark.parametrize("method", METERS)
def test_all_methods_give_the_tokens_of_the_bare_model(family: Any, method: str) -> None:
    vlm, prepared = family
    expected = vlm.model.generate(
        **prepared.inputs, max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    meter = make_meter(vlm, method)
    reading = meter(prepared, 6)
    assert reading.token_ids == expected[0, prepared.inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("where", ["vision_encoder", "head"])
@pytest.mark.parametrize("method", METERS)
def test_nothing_stays_behind(family: Any, method: str, where: str) -> None:
    vlm, prepared = family
    meter = make_meter(vlm, method)
    meter.bare(prepared, 3)  # transformers adds hooks of its own when it first runs
    clean = state(vlm.model)
    meter(prepared, 3)
    assert state(vlm.model) == clean

    def explode(*_: Any) -> None:
        raise RuntimeError("out of everything")

    handle = getattr(vlm.components, where).register_forward_hook(explode)
    with pytest.raises(RuntimeError, match="out of everything"):
        meter(prepared, 3)
    handle.remove()
    assert state(vlm.model) == clean
    assert gc.isenabled()
    assert len(meter(prepared, 3).token_ids) == 3  # and the meter goes on


def test_an_own_wrapper_of_the_model_is_put_back(llava: Any) -> None:
    vlm, prepared = llava
    base, calls = vlm.model.base_model, []
    original = base.get_image_features

    def own(pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        calls.append(1)
        return original(pixel_values, **kwargs)

    base.get_image_features = own
    make_meter(vlm)(prepared, 2)
    assert calls == [1]
    assert base.get_image_features is own


def test_image_features_inside_the_forward_are_vision_too(
    llava: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm, prepared = llava
    before = make_meter(vlm)(prepared, 3)
    monkeypatch.setattr(type(vlm.model), "_supports_mm_encoder_outputs", lambda self: False)
    meter = make_meter(vlm)
    inside = meter(prepared, 3)
    labels = [mark.label for mark in meter.timeline.host_marks()]
    assert labels.index("T_LLM_prefill") < labels.index("T_vision_encoder")
    assert inside.token_ids == before.token_ids
    assert inside.times["T_vision_encoder"] > 0
    assert inside.times["T_LLM_prefill"] > 0
    total = sum(inside.times[name] for name in COMPONENTS)
    assert total == pytest.approx(inside.times["T_total"], abs=1e-9)


def test_a_merger_inside_the_encoder_is_projector(qwen: Any) -> None:
    vlm, prepared = qwen
    meter = TimelineMeter(vlm)
    meter(prepared, 2)
    marks = meter.timeline.host_marks()
    opened = [mark.label for mark in marks if mark.opens]
    assert opened[:4] == ["T_other", "T_projector", "T_vision_encoder", "T_projector"]


def test_a_list_of_projectors_is_hooked_one_by_one(llava: Any) -> None:
    vlm, prepared = llava
    (projector,) = vlm.components.projector
    vlm.components = type(vlm.components)(
        vlm.components.vision_encoder,
        (nn.ModuleList([projector]),),
        vlm.components.language_model,
        vlm.components.head,
    )
    meter = make_meter(vlm)
    meter(prepared, 2)
    assert [m.label for m in meter.timeline.host_marks() if m.opens].count("T_projector") == 2


def test_natural_length_stops_at_the_end_of_sequence(llava: Any) -> None:
    vlm, prepared = llava
    meter = make_meter(vlm)
    first = meter(prepared, 8).token_ids[0]
    vlm.model.generation_config.eos_token_id = first
    stopped = meter(prepared, 8, stop_at_eos=True)
    assert stopped.token_ids == [first]
    assert stopped.times["decode_step_ms"] == []
    assert len(meter(prepared, 8).token_ids) == 8  # forced: the same token does not stop it


def test_key_value_cache_is_counted(llava: Any) -> None:
    vlm, prepared = llava
    prompt = prepared.inputs["input_ids"].shape[1]
    per_token = 2 * 2 * 2 * 8 * 4  # layers × (keys, values) × kv heads × head_dim × float32
    assert make_meter(vlm)(prepared, 5).kv_cache_bytes == (prompt + 4) * per_token
    static = make_meter(vlm, "timeline", "static", max_cache_len=64)
    assert static(prepared, 5).kv_cache_bytes == 64 * per_token
    assert make_meter(vlm)(prepared, 5).peak_memory_bytes is None


def test_no_collection_inside_the_region(llava: Any) -> None:
    vlm, prepared = llava
    seen: list[bool] = []
    handle = vlm.components.head.register_forward_hook(lambda *_: seen.append(gc.isenabled()))
    make_meter(vlm)(prepared, 2)
    handle.remove()
    assert seen == [False, False]
    assert gc.isenabled()
    gc.disable()
    try:
        with quiet(torch.device("cpu")):
            pass
        assert not gc.isenabled()  # as it was found
    finally:
        gc.enable()


def test_a_device_clock_has_its_twin_on_the_host(llava: Any) -> None:
    """Two host clocks in place of a GPU's: each time has both, the parts of both add up."""
    vlm, prepared = llava
    meter = make_meter(vlm)
    meter.timeline = Timeline(HostClock(), HostClock())
    times = meter(prepared, 3).times
    parts = ("T_vision_total", "T_LLM_prefill", "T_LLM_decode", "T_other")
    for twin in ("", "_host"):
        assert sum(times[part + twin] for part in parts) == pytest.approx(times["T_total" + twin])
    assert times["T_reduction"] is times["T_reduction_host"] is None  # nothing was reduced


def test_a_static_cache_does_not_remember_longer_requests(llava: Any) -> None:
    vlm, prepared = llava
    with make_meter(vlm, "timeline", "static") as meter:
        long = meter(prepared, 140).kv_cache_bytes
    with make_meter(vlm, "timeline", "static") as meter:
        assert (meter(prepared, 5).kv_cache_bytes or 0) < (long or 0)


def test_a_model_that_writes_too_little_is_an_error(llava: Any) -> None:
    vlm, prepared = llava
    original = vlm.model.generate
    vlm.model.generate = lambda **kwargs: original(**{**kwargs, "max_new_tokens": 2})
    with pytest.raises(MeasurementError, match="2 tokens where 4 were forced"):
        make_meter(vlm)(prepared, 4)


def test_other_devices_are_refused(llava: Any) -> None:
    vlm, _ = llava
    vlm.device = torch.device("meta")
    with pytest.raises(MeasurementError, match=r"found model.device=meta; expected cpu or cuda"):
        make_meter(vlm)


def clocked(monkeypatch: pytest.MonkeyPatch, meter: SubtractionMeter, parts: list[float]) -> None:
    """Let the separate runs take given times, without touching the model."""
    durations = iter(parts)
    monkeypatch.setattr(meter, "_timed", lambda function: (next(durations), function())[::1])


def test_subtraction_keeps_signed_differences_beside_clamped_ones(
    llava: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm, prepared = llava
    meter = SubtractionMeter(vlm)
    clocked(monkeypatch, meter, [1e6, 1e6 + 5, 1e6 - 3])  # features, encoder, forward: far above
    reading = meter(prepared, 4)
    times = reading.times
    assert times["raw_T_projector"] == -5
    assert times["T_projector"] == 0
    assert times["raw_T_LLM_prefill"] == -3
    assert times["T_LLM_prefill"] == 0
    assert times["raw_T_LLM_decode"] == pytest.approx(times["T_total"] - 1e6)
    assert times["T_LLM_decode"] == 0
    assert times["T_other"] == pytest.approx(times["T_total"] - 1e6)  # the parts exceed the total
    assert times["decode_step_ms"] is None
    assert reading.timed_ms == pytest.approx(3e6 + 2 + times["T_total"])


def test_subtraction_of_parts_that_fit_closes(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, prepared = llava
    meter = SubtractionMeter(vlm)
    clocked(monkeypatch, meter, [3e-6, 2e-6, 5e-6])
    times = meter(prepared, 4).times
    assert times["T_projector"] == pytest.approx(1e-6)
    assert times["T_LLM_prefill"] == pytest.approx(2e-6)
    assert times["T_other"] == pytest.approx(0, abs=1e-9)
    parts = times["T_vision_total"] + times["T_LLM_prefill"] + times["T_LLM_decode"]
    assert parts == pytest.approx(times["T_total"])


def test_subtraction_cannot_see_a_projector_inside_the_encoder(qwen: Any) -> None:
    vlm, prepared = qwen
    times = make_meter(vlm, "subtraction")(prepared, 3).times
    assert times["T_vision_encoder"] is None
    assert times["T_projector"] is None
    assert times["T_vision_total"] > 0


def test_hook_times_from_the_end_of_the_first_block_to_the_end_of_the_last(llava: Any) -> None:
    vlm, prepared = llava
    blocks = blocks_of(vlm.components.language_model)
    assert len(blocks) == 2
    meter = make_meter(vlm, "hook")
    order: list[str] = []
    handles = [
        block.register_forward_pre_hook(lambda *_, i=i: order.append(f"block {i}"))
        for i, block in enumerate(blocks)
    ]
    for name in ("open", "close"):
        original = getattr(meter.timeline, name)
        setattr(
            meter.timeline,
            name,
            lambda label, f=original, n=name: (order.append(f"{n} {label}"), f(label)),
        )
    times = meter(prepared, 2).times
    for handle in handles:
        handle.remove()
    start = order.index("open T_other")
    assert order[start : start + 5] == [
        "open T_other",
        "block 0",
        "open T_LLM_prefill",
        "block 1",
        "close T_LLM_prefill",
    ]
    assert order[start + 5 :] == ["block 0", "block 1"]  # the decode step is not hooked
    assert times["T_LLM_prefill"] > 0
    assert times["raw_T_LLM_prefill"] is None


def test_a_decoder_without_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match="no list of blocks"):
        blocks_of(nn.Linear(2, 2))


def compiled_graphs(vlm: Any, prepared: Any, meter: Meter, runs: int) -> Any:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    readings = [meter(prepared, 6) for _ in range(runs)]
    readings.append(meter(prepared, 3))
    _, bare = meter.bare(prepared, 6)
    assert all(reading.token_ids == bare[: len(reading.token_ids)] for reading in readings)
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"], readings


def test_compiled_step_is_marked_from_outside(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler itself runs (dynamo), its code generator does not: the slow test has that."""
    vlm, prepared = llava
    monkeypatch.setattr(graphs, "BACKEND", "eager")
    eager = make_meter(vlm)(prepared, 6).token_ids
    with make_meter(vlm, "timeline", "compiled", max_cache_len=64) as meter:
        count, readings = compiled_graphs(vlm, prepared, meter, 2)
    assert count == 1
    assert readings[0].token_ids == eager
    assert len(readings[0].times["decode_step_ms"]) == 5
    assert not {"_compiled_call", "_previous_max_cache_length"} & set(vars(vlm.model))


@pytest.mark.slow
def test_compiled_decode_is_one_graph_without_breaks(family: Any) -> None:
    vlm, prepared = family
    with make_meter(vlm, "timeline", "compiled", max_cache_len=64) as meter:
        graphs, _ = compiled_graphs(vlm, prepared, meter, 2)
    assert graphs == 1


def test_nvtx_ranges_are_around_the_components_and_closed_whatever_happens(
    llava: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm, prepared = llava
    stack: list[str] = []
    pushed: list[str] = []

    def push(label: str) -> None:
        pushed.append(label)
        stack.append(label)

    monkeypatch.setattr(torch.cuda.nvtx, "range_push", push)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", stack.pop)
    plain = make_meter(vlm)(prepared, 3)
    assert not pushed
    reading = make_meter(vlm, nvtx=True)(prepared, 3)
    assert reading.token_ids == plain.token_ids
    assert set(pushed) == {
        "T_vision_encoder",
        "T_projector",
        "T_LLM_prefill",
        "T_LLM_decode_forward",
    }
    assert pushed.count("T_LLM_decode_forward") == 2
    assert not stack

    def explode(*_: Any) -> None:
        raise RuntimeError("no")

    handle = vlm.components.head.register_forward_hook(explode)
    with pytest.raises(RuntimeError, match="no"):
        make_meter(vlm, nvtx=True)(prepared, 3)
    handle.remove()
    assert not stack


@pytest.mark.gpu
# the compiler recommends TF32 and tells of its own choices; what is tested here is the clock
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("engine", [*ENGINES, *COMPILED])
def test_cuda_events_partition_a_request(llava: Any, engine: str) -> None:
    vlm, prepared = llava
    vlm.device = torch.device("cuda", 0)
    vlm.model.to(vlm.device)
    placed = type(prepared)({name: value.to(vlm.device) for name, value in prepared.inputs.items()})
    with make_meter(vlm, "timeline", engine, max_cache_len=64) as meter:
        meter(placed, 6)
        reading = meter(placed, 6)
        _, bare = meter.bare(placed, 6)
    times = reading.times
    assert reading.token_ids == bare
    assert all(times[name] >= 0 for name in COMPONENTS)
    assert sum(times[name] for name in COMPONENTS) == pytest.approx(times["T_total"], abs=1e-6)
    assert sum(times[f"{n}_host"] for n in COMPONENTS) == pytest.approx(times["T_total_host"])
    assert len(times["decode_step_ms"]) == 5
    split = times["T_LLM_decode_forward"] + times["T_LLM_decode_between"]
    assert split == pytest.approx(times["T_LLM_decode"], abs=1e-6)
    assert min(times["T_LLM_decode_forward"], times["T_LLM_decode_between"]) > 0
    assert (reading.peak_memory_bytes or 0) > (reading.kv_cache_bytes or 0) > 0
