"""What each method selects, worked out by hand; what is refused; whose time a method's is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from tests.reduction.test_reduced_logits import make
from vlm_latency.errors import UserError
from vlm_latency.instrument.intervals import intervals
from vlm_latency.instrument.methods import TimelineMeter
from vlm_latency.instrument.timeline import Timeline
from vlm_latency.models import load
from vlm_latency.models.boundaries import boundaries
from vlm_latency.options import Options
from vlm_latency.reduction import METHODS, Kept, Method, Seen, method_of, refusal
from vlm_latency.reduction.hooks import Reducer, watching
from vlm_latency.reduction.vlm import Reduced, smaller


def selected(name: str, features: list[list[float]], count: int, attention: Any = None) -> Kept:
    given = None if attention is None else torch.tensor(attention)
    return METHODS[name]().select(Seen(torch.tensor(features), count, given))


def test_uniform_is_at_equal_distances() -> None:
    assert selected("uniform", [[0.0]] * 9, 3).index.tolist() == [1, 4, 7]


@pytest.mark.parametrize("name", ["attention", "llm-attention"])
def test_attention_keeps_the_most_attended(name: str) -> None:
    found = selected(name, [[0.0]] * 4, 2, [0.1, 0.4, 0.2, 0.3])
    assert sorted(found.index.tolist()) == [1, 3]


def test_diversity_takes_one_of_each_kind() -> None:
    angles = torch.tensor([0.0, 0.01, 1.5, 1.51, 3.0])
    features = torch.stack([angles.cos(), angles.sin()], dim=1).tolist()
    chosen = sorted(selected("diversity", features, 3).index.tolist())
    assert chosen[-1] == 4 and {chosen[0]} <= {0, 1} and {chosen[1]} <= {2, 3}


def test_diversity_never_takes_one_twice() -> None:
    assert len(set(selected("diversity", [[1.0, 0.0]] * 6, 4).index.tolist())) == 4


def test_merging_averages_the_most_alike() -> None:
    found = selected("merging", [[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [1.0, 1.0]], 3)
    assert found.index.tolist() == [1, 2, 3]
    assert found.features is not None
    assert found.features.tolist() == [[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]]


def test_merging_weighs_by_what_was_merged_before() -> None:
    found = selected("merging", [[1.0], [2.0], [3.0], [6.0], [10.0]], 1)
    assert found.features is not None
    assert found.features.tolist() == [[pytest.approx(22 / 5)]]


@pytest.mark.parametrize("name", list(METHODS))
def test_methods_keep_as_many_as_asked_for(name: str) -> None:
    if METHODS[name].where == "image" or name == "identity":
        return
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    found = METHODS[name]().select(Seen(features, 13, torch.rand(50)))
    assert len(set(found.index.tolist())) == 13


def test_a_smaller_image_has_no_more_tokens_than_asked_for() -> None:
    vlm: Any = load(Options.from_parameters({"model": {"name": "null-model"}}).model)
    size = smaller(vlm.architecture, (640, 480), 0.5)
    tokens = vlm.architecture.image_tokens
    assert tokens(*size).num_vision_tokens <= 0.5 * tokens(640, 480).num_vision_tokens
    assert size[0] / size[1] == pytest.approx(4 / 3, rel=0.05)


@pytest.mark.parametrize("family", ["molmo", "llava", "qwen2_5_vl", "internvl"])
def test_every_token_has_the_encoders_attention(family: str) -> None:
    """LLaVA's are the weights that transformers itself gives out."""
    vlm, inputs = make(family)
    seen: list[torch.Tensor] = []

    class Look(Method):
        needs_attention = True

        def select(self, given: Seen) -> Kept:
            seen.append(given.attention)  # type: ignore[arg-type]
            return Kept(torch.arange(len(given.features)))

    with Reducer(vlm, Look(), 1.0).acting(inputs), torch.inference_mode():
        vlm.model(**inputs, use_cache=True)
    tokens = int((inputs["image_input_idx"] >= 0).sum()) if family == "molmo" else None
    if tokens is None:
        tokens = int((inputs["input_ids"] == vlm.model.config.image_token_id).sum())
    (scores,) = seen
    assert scores.shape == (tokens,) and bool((scores > 0).all())
    if family == "llava":
        vlm.model.set_attn_implementation("eager")
        with torch.inference_mode():
            tower = vlm.model.base_model.vision_tower
            weights = tower(inputs["pixel_values"], output_attentions=True).attentions
        layer = vlm.model.config.vision_feature_layer
        torch.testing.assert_close(scores, weights[layer][0, :, 0, 1:].mean(0))


def test_watching_changes_nothing_and_leaves_nothing() -> None:
    vlm, inputs = make("llava")
    layer = vlm.components.language_model.layers[0]
    config = layer.self_attn.config
    with torch.inference_mode():
        expected = vlm.model(**inputs).logits
        with watching(layer, lambda *_: None):
            torch.testing.assert_close(vlm.model(**inputs).logits, expected, rtol=0, atol=0)
    assert layer.self_attn.config is config


class Burns(Method):
    """Takes 5 ms of a clock that stands still otherwise."""

    clock: Any

    def select(self, seen: Seen) -> Kept:
        self.clock.now += 5_000_000
        return Kept(torch.arange(seen.count))


class Still:
    """A clock that only what is tested moves."""

    now = 0

    def reserve(self, count: int) -> None:
        self.times = [0] * count

    def stamp(self, slot: int) -> None:
        self.times[slot] = self.now

    def read(self, count: int) -> list[int]:
        return self.times[:count]


def test_what_a_method_burns_is_its_own() -> None:
    vlm, inputs = make("llava")
    clock, method = Still(), Burns()
    method.clock = clock
    timeline = Timeline(clock)  # type: ignore[arg-type]
    timeline.restart(64)
    reducer = Reducer(vlm, method, 0.5)
    with (
        torch.inference_mode(),
        reducer.acting(inputs, timeline.open, timeline.close),
        boundaries(vlm.model, vlm.components, timeline.open, timeline.close),
    ):
        timeline.open("T_other")
        vlm.model.generate(**inputs, max_new_tokens=2, do_sample=False, eos_token_id=None)
        timeline.finish("T_other")
    times = intervals(timeline.host_marks(), 2)
    assert times["T_reduction"] == times["T_total"] == times["T_first_token"] == 5.0
    assert times["T_LLM_prefill"] == times["T_LLM_decode"] == times["T_vision_total"] == 0


def test_parts_add_up_with_the_method_among_them() -> None:
    vlm: Any = load(
        Options.from_parameters({"model": {"name": "tiny-molmo", "device": "cpu"}}).model
    )
    reduced = Reduced(vlm, {"random": method_of("random")})
    image = Image.effect_noise((336, 336), 64).convert("RGB")
    prepared = reduced.place(reduced.prepare(image, "What?", method="random", keep=0.25))
    with reduced.meter(TimelineMeter) as meter:
        reading = meter(prepared, 3)
        plain = meter(reduced.place(reduced.prepare(image, "What?")), 3)
    times = reading.times
    parts = ("T_vision_total", "T_reduction", "T_LLM_prefill", "T_LLM_decode", "T_other")
    assert sum(times[name] for name in parts) == pytest.approx(times["T_total"])
    assert times["T_reduction"] > 0 and plain.times["T_reduction"] is None
    before = prepared.counts.num_vision_tokens
    kept = times["num_vision_tokens_kept"]
    assert kept == round(before / 4) and plain.times["num_vision_tokens_kept"] == before
    assert reading.prefill_length == plain.prefill_length - before + kept
    assert reading.kv_cache_bytes < plain.kv_cache_bytes


def test_static_caches_run_methods_before_the_decoder() -> None:
    vlm: Any = load(
        Options.from_parameters({"model": {"name": "tiny-molmo", "device": "cpu"}}).model
    )
    reduced = Reduced(vlm, {"random": method_of("random")})
    image = Image.effect_noise((336, 336), 64).convert("RGB")
    prepared = reduced.place(reduced.prepare(image, "What?", method="random", keep=0.25))
    tokens = {}
    for engine in ("eager", "static"):
        with reduced.meter(lambda v, engine=engine: TimelineMeter(v, engine)) as meter:
            tokens[engine] = meter(prepared, 6).token_ids
    assert tokens["eager"] == tokens["static"]


def test_what_an_engine_cannot_run_is_said() -> None:
    assert "differ by layer" in refusal(method_of("llm-attention"), "static")
    assert "attention weights" in refusal(method_of("attention"), "loop")
    assert not refusal(method_of("attention"), "compiled")
    assert not any(refusal(method_of(name), "eager") for name in METHODS)


def test_a_method_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from vlm_latency.reduction import Kept, Method\n"
        "class Mine(Method):\n"
        "    def select(self, seen):\n"
        "        return Kept(seen.features.norm(dim=-1).topk(seen.count).indices)\n"
        "other = 1\n"
    )
    found = method_of(f"{file}:Mine").select(Seen(torch.tensor([[1.0], [3.0], [2.0]]), 2))
    assert sorted(found.index.tolist()) == [1, 2]
    for name, said in (
        (f"{file}:other", "made from vlm_latency.reduction.Method"),
        (f"{tmp_path / 'none.py'}:Mine", "there is no file"),
        ("raandom", "expected one of identity"),
    ):
        with pytest.raises(UserError, match=said):
            method_of(name)


def test_a_model_whose_prompt_does_not_say_is_refused() -> None:
    from vlm_latency.reduction.hooks import image_positions

    with pytest.raises(UserError, match="cannot be reduced"):
        image_positions(SimpleNamespace(model_type="odd"), {"input_ids": torch.ones(1, 2)})
