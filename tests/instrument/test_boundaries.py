"""The edges of components, as every listener sees them."""

from __future__ import annotations

from typing import Any

import pytest

from vlm_latency.models.boundaries import boundaries


def generate(vlm: Any, prepared: Any, tokens: int, **more: Any) -> Any:
    return vlm.model.generate(
        **prepared.inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=None, **more
    )


def listening(vlm: Any, seen: list[str], name: str = "") -> Any:
    return boundaries(
        vlm.model,
        vlm.components,
        lambda label: seen.append(f"{name}+{label}"),
        lambda label: seen.append(f"{name}-{label}"),
    )


def test_every_family_passes_from_vision_to_prefill_to_decode(family: Any) -> None:
    vlm, prepared = family
    seen: list[str] = []
    with listening(vlm, seen):
        generate(vlm, prepared, 3)
    depth: list[str] = []
    for edge in seen:
        if edge[0] == "+":
            depth.append(edge[1:])
        else:
            assert depth.pop() == edge[1:]  # labels nest
    assert not depth
    language = [edge for edge in seen if "LLM" in edge]
    step = ["+T_LLM_decode_forward", "-T_LLM_decode_forward"]
    assert language == ["+T_LLM_prefill", "-T_LLM_prefill", *step, *step]
    assert seen[:2] == ["+T_projector", "+T_vision_encoder"]
    assert seen.count("+T_vision_encoder") == 1
    edges = len(seen)
    generate(vlm, prepared, 1)
    assert len(seen) == edges  # and then it is over


def test_the_inner_listener_sees_what_the_outer_one_does_as_part_of_the_component(
    llava: Any,
) -> None:
    vlm, prepared = llava
    seen: list[str] = []
    with listening(vlm, seen, "outer"), listening(vlm, seen, "inner"):
        generate(vlm, prepared, 2)
    for label in ("T_vision_encoder", "T_LLM_prefill", "T_LLM_decode_forward"):
        mine = [edge for edge in seen if edge.endswith(label)]
        assert mine == [f"inner+{label}", f"outer+{label}", f"outer-{label}", f"inner-{label}"]


def test_mergers_are_the_projector_inside_the_encoder(family: Any) -> None:
    vlm, _ = family
    inside = {"Qwen2_5_VLForConditionalGeneration"}
    assert bool(vlm.components.mergers) == (type(vlm.model).__name__ in inside)
    assert set(vlm.components.mergers) <= set(vlm.components.projector_parts)


def test_a_compiled_step_is_seen_from_outside(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, prepared = llava
    steps: list[int] = []

    def get_compiled_call(*args: Any, **kwargs: Any) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            steps.append(1)
            return vlm.model.forward(*args, **kwargs)  # as compiled code: no hooks run

        return step

    monkeypatch.setattr(vlm.model, "get_compiled_call", get_compiled_call)
    seen: list[str] = []
    from transformers import CompileConfig

    config = CompileConfig()
    config._compile_all_devices = True  # type: ignore[assignment]
    with listening(vlm, seen):
        generate(vlm, prepared, 4, cache_implementation="static", compile_config=config)
    assert len(steps) == 3
    assert seen.count("+T_LLM_decode_forward") == seen.count("-T_LLM_decode_forward") == 3
    assert vlm.model.get_compiled_call is get_compiled_call
