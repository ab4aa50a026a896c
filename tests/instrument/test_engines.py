"""Every engine writes the tokens of eager ``generate()``, with the same marks, and goes again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vlm_latency.errors import MeasurementError, ModelError
from vlm_latency.instrument import graphs
from vlm_latency.instrument.engines import PROMPT_STEP, Engine
from vlm_latency.instrument.kept_cache import KeptCache
from vlm_latency.instrument.methods import make_meter
from vlm_latency.models import load
from vlm_latency.models.zoo import load_zoo
from vlm_latency.options import COMPILED, ModelOptions
from vlm_latency.records import COMPONENTS

FRONT = ("compiled-all", "loop")
TOKENS = 7


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Dynamo traces what is compiled, but no code is generated: seconds instead of a minute."""
    monkeypatch.setattr(graphs, "BACKEND", "eager")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def longer(prepared: Any) -> Any:
    """The same request with more text behind the image."""
    ids = prepared.inputs["input_ids"]
    more = torch.tensor([[13, 14, 15, 16, 17]]).expand(len(ids), -1)
    inputs = {**prepared.inputs, "input_ids": torch.cat([ids, more], dim=1)}
    for name in ("attention_mask", "mm_token_type_ids"):
        if name in inputs:
            fill = inputs[name].new_full(more.shape, int(name == "attention_mask"))
            inputs[name] = torch.cat([inputs[name], fill], dim=1)
    return type(prepared)(inputs)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["static", "loop"])
def test_tokens_are_those_of_eager_generate(family: Any, engine: str, traced: None) -> None:
    """Also for M-RoPE (Qwen2.5-VL), on a longer prompt after a shorter one, and again."""
    same_tokens(*family, engine)


@pytest.mark.parametrize("engine", ["compiled", "compiled-all", "loop"])
def test_tokens_of_compiled_generate(llava: Any, engine: str, traced: None) -> None:
    same_tokens(*llava, engine)


def same_tokens(vlm: Any, short: Any, engine: str) -> None:
    requests = [short, longer(short), short, longer(short)]
    expected = [make_meter(vlm)(request, TOKENS).token_ids for request in requests]
    with make_meter(vlm, "timeline", engine, max_cache_len=128) as meter:
        readings = [meter(request, TOKENS) for request in requests]
        assert meter.bare(short, TOKENS)[1] == expected[0]
        report = meter.engine.report()
    assert [reading.token_ids for reading in readings] == expected
    for reading in readings:
        times = reading.times
        assert len(times["decode_step_ms"]) == TOKENS - 1
        assert min(times["decode_step_ms"]) > 0
        assert times["T_vision_encoder"] > 0
        assert sum(times[part] for part in COMPONENTS) == pytest.approx(times["T_total"])
    assert (report["compile_s"] > 0) == (engine in COMPILED)
    assert ("the prefill" in report["parts"]) == (engine in FRONT)
    assert ("the decode step" in report["parts"]) == (engine == "loop")


def test_a_sliding_window_is_kept_by_the_mask(traced: None, tmp_path: Path) -> None:
    """Gemma 3: windows shorter than the prompt, and an image that is seen in both directions."""
    config = deepcopy(load_zoo().models["tiny-gemma3"].config)
    layers = ["sliding_attention", "full_attention"]
    config["text_config"] |= {"num_hidden_layers": 2, "layer_types": layers, "sliding_window": 200}
    config["vision_config"] |= {"num_hidden_layers": 2, "image_size": 224}
    entry = {"config": config, "image_settings": {"size": {"height": 224, "width": 224}}}
    (tmp_path / "zoo.yml").write_text(json.dumps({"models": {"small": entry}}))
    vlm = load(ModelOptions(name="small", zoo_file=str(tmp_path / "zoo.yml"), device="cpu"))
    prepared = vlm.place(vlm.prepare(Image.effect_noise((64, 64), 90).convert("RGB"), "what?"))
    expected = make_meter(vlm)(prepared, TOKENS).token_ids
    for engine in ("static", "loop"):
        with make_meter(vlm, "timeline", engine) as meter:
            assert [meter(prepared, TOKENS).token_ids for _ in range(2)] == [expected] * 2


def test_prompts_of_one_bucket_share_a_prefill(llava: Any, traced: None) -> None:
    vlm, short = llava
    with make_meter(vlm, "timeline", "compiled-all", max_cache_len=128) as meter:
        for request in (short, short, longer(short)):
            assert meter(request, 2).prefill_length == request.inputs["input_ids"].shape[1]
        assert short.inputs["input_ids"].shape[1] % PROMPT_STEP
        assert meter.engine.report()["parts"]["the prefill"]["shapes"] == 1


def test_the_loop_stops_where_the_answer_ends(llava: Any, traced: None) -> None:
    vlm, prepared = llava
    free = make_meter(vlm)(prepared, TOKENS).token_ids
    vlm.model.generation_config.eos_token_id = free[2]
    vlm.model.generation_config.pad_token_id = 0
    with make_meter(vlm, "timeline", "loop") as meter:
        stopped = meter(prepared, TOKENS, stop_at_eos=True)
        assert stopped.token_ids == free[: free.index(free[2]) + 1]
        assert len(stopped.times["decode_step_ms"]) == len(stopped.token_ids) - 1
        assert meter(prepared, TOKENS).token_ids == free  # forced: the same token does not stop it


def test_one_cache_serves_all_requests_and_grows_when_it_must(llava: Any, traced: None) -> None:
    vlm, prepared = llava
    engine = Engine(vlm, "loop")
    first = engine.arguments(prepared.inputs, 5, False)["past_key_values"]
    assert engine.arguments(prepared.inputs, 9, False)["past_key_values"] is first
    grown = engine.arguments(prepared.inputs, 500, False)["past_key_values"]
    assert grown.max_len > first.max_len
    with make_meter(vlm, "timeline", "loop") as meter:
        few = meter(prepared, 3).token_ids
        many = meter(prepared, 100).token_ids  # a longer cache: everything is captured again
        assert many[:3] == few
        assert many == make_meter(vlm)(prepared, 100).token_ids


@pytest.mark.parametrize("engine", FRONT)
def test_another_length_of_the_cache_compiles_the_decode_step_alone(
    llava: Any, traced: None, engine: str
) -> None:
    """As the experiments of one command do, each with a cache of its own."""
    vlm, prepared = llava
    seen = []
    for length in (128, 128, 192, 320):
        with make_meter(vlm, "timeline", engine, max_cache_len=length) as meter:
            for request in (prepared, longer(prepared)):
                meter(request, 3)
        seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert [after - before for before, after in pairwise(seen)] == [0, 1, 1]


def test_what_does_not_compile_is_left_eager_and_named(
    qwen: Any, traced: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Qwen's encoder cuts windows by the values of ``image_grid_thw``."""
    vlm, prepared = qwen
    with make_meter(vlm, "timeline", "compiled-all") as meter:
        meter(prepared, 1)
        part = meter.engine.report()["parts"]["the vision encoder"]
    assert part["shapes"] == 0
    assert "depends on its inputs' values" in part["eager"]
    assert "the vision encoder is not compiled" in caplog.text


def test_a_step_that_does_not_compile_ends_the_run(llava: Any, traced: None) -> None:
    vlm, prepared = llava
    norm = vlm.components.language_model.norm

    def awkward(hidden: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return type(norm).forward(norm, hidden)

    norm.forward = awkward
    with (
        make_meter(vlm, "timeline", "loop") as meter,
        pytest.raises(ModelError, match="the decode step does not compile"),
    ):
        meter(prepared, 3)


def test_engines_refuse_what_they_cannot_run(llava: Any) -> None:
    vlm, prepared = llava
    vlm.model.generation_config.repetition_penalty = 1.1
    with pytest.raises(ModelError, match=r"repetition_penalty=1\.1"):
        make_meter(vlm, "timeline", "loop")
    make_meter(vlm, "timeline", "compiled-all").close()
    with pytest.raises(MeasurementError, match="greedy only"):
        engine = Engine.__new__(Engine)
        engine._decode(vlm.model, prepared.inputs["input_ids"], [object()], [], None)
    vlm.model.set_attn_implementation("flex_attention")
    with pytest.raises(ModelError, match="attn_implementation=sdpa or eager"):
        make_meter(vlm, "timeline", "compiled")


def test_an_empty_layer_gives_back_what_it_was_given(llava: Any) -> None:
    vlm, _ = llava
    cache = KeptCache(vlm.model.config, 16)
    keys, values = torch.rand(1, 2, 5, 8), torch.rand(1, 2, 5, 8)
    assert cache.update(keys, values, 0)[0] is keys
    assert cache.get_seq_length() == 0
    cache.update(keys, values, 1)
    cache.filled(5)
    assert int(cache.get_seq_length()) == 5
    held, _ = cache.update(keys[:, :, :1], values[:, :, :1], 0)
    assert held.shape[2] == 16
    assert torch.equal(held[:, :, :6], torch.cat([keys, keys[:, :, :1]], dim=2))
    cache.start()
    assert cache.get_mask_sizes(3, 0) == (3, 0)


@pytest.mark.slow
def test_generated_code_writes_the_same_tokens(qwen: Any) -> None:
    """The whole compiler, with the code that it generates for this machine."""
    torch._dynamo.reset()
    vlm, prepared = qwen
    expected = make_meter(vlm)(prepared, TOKENS).token_ids
    with make_meter(vlm, "timeline", "loop") as meter:
        assert [meter(prepared, TOKENS).token_ids for _ in range(3)] == [expected] * 3


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::UserWarning")  # the compiler tells of its choices
@pytest.mark.parametrize("engine", ["static", "compiled", "loop"])
def test_captured_graphs_write_the_tokens_of_eager(llava: Any, engine: str) -> None:
    same_tokens_on_a_gpu(*llava, engine)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_all_parts_captured_write_the_tokens_of_eager(family: Any) -> None:
    same_tokens_on_a_gpu(*family, "compiled-all")


def same_tokens_on_a_gpu(vlm: Any, prepared: Any, engine: str) -> None:
    """In float32, where no two logits tie; two engines after each other on one model."""
    torch._dynamo.reset()
    vlm.device = torch.device("cuda", 0)
    vlm.model.to(vlm.device)
    requests = [
        type(prepared)({key: value.to(vlm.device) for key, value in request.inputs.items()})
        for request in (prepared, longer(prepared), prepared)
    ]
    expected = [make_meter(vlm)(request, TOKENS).token_ids for request in requests]
    for _ in range(2):
        with make_meter(vlm, "timeline", engine, max_cache_len=128) as meter:
            for _ in range(2):
                found = [meter(request, TOKENS).token_ids for request in requests]
                assert found == expected
