"""Logits with nothing dropped are the baseline's; with tokens dropped, a forward's made by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.instrument.conftest import tiny
from vlm_latency.models import load
from vlm_latency.models.components import find_components
from vlm_latency.options import Options
from vlm_latency.reduction import METHODS, Kept, Method, Seen
from vlm_latency.reduction.hooks import Reducer, image_positions

FAMILIES = ("molmo", "llava", "qwen2_5_vl", "internvl")
INSIDE = [name for name, method in METHODS.items() if method.where != "image"]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> tuple[Any, dict[str, torch.Tensor]]:
    return make(request.param)


def make(family: str) -> tuple[Any, dict[str, torch.Tensor]]:
    if family == "molmo":
        from PIL import Image

        vlm: Any = load(
            Options.from_parameters({"model": {"name": "tiny-molmo", "device": "cpu"}}).model
        )
        image = Image.effect_noise((640, 480), 64).convert("RGB")
        return vlm, vlm.place(vlm.prepare(image, "What is it?")).inputs
    model, inputs = tiny(family)
    parts = find_components(model).resolve(model)
    return SimpleNamespace(model=model, components=parts), inputs


def generate(vlm: Any, inputs: Any, reducer: Reducer | None = None) -> list[torch.Tensor]:
    """Logits of the prefill and two decode steps."""

    def run() -> Any:
        with torch.inference_mode():
            return vlm.model.generate(
                **inputs, max_new_tokens=3, do_sample=False, eos_token_id=None,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip

    if reducer is None:
        return list(run().logits)
    with reducer.acting(inputs):
        return list(run().logits)


@pytest.mark.parametrize("name", INSIDE)
def test_nothing_dropped_is_the_baseline(model: Any, name: str) -> None:
    vlm, inputs = model
    expected = generate(vlm, inputs)
    method = METHODS[name]()
    if method.where == "layer":
        method.layer = 1  # type: ignore[misc]
    reducer = Reducer(vlm, method, 1.0)
    found = generate(vlm, inputs, reducer)
    assert reducer.kept == len(image_positions(vlm.model.config, inputs))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(generate(vlm, inputs), expected, rtol=0, atol=0)


class Every3rd(Method):
    def select(self, seen: Seen) -> Kept:
        return Kept(torch.arange(0, len(seen.features), 3))


def by_hand(vlm: Any, inputs: Any, order: torch.Tensor, layer: int) -> list[torch.Tensor]:
    """A prefill on the sequence shortened before a layer, and two steps, from the decoder's parts."""
    seen: dict[str, Any] = {}

    def note(_: Any, args: Any, kwargs: Any) -> None:
        seen.update(kwargs)

    decoder = vlm.components.language_model
    handle = decoder.register_forward_pre_hook(note, with_kwargs=True)
    with torch.inference_mode():
        vlm.model.generate(**inputs, max_new_tokens=1, do_sample=False)
        handle.remove()
        states, positions = seen["inputs_embeds"], seen["position_ids"]
        rotary = positions[1:] if positions.ndim == 3 and len(positions) == 4 else positions
        caches = DynamicCache(config=decoder.config)
        found = []
        next_positions = rotary[..., -1:]
        for step in range(3):
            hidden, at = states, rotary
            for number, block in enumerate(decoder.layers):
                if step == 0 and number == layer:
                    hidden, at = hidden[:, order], at[..., order]
                n = hidden.shape[1]
                mask = torch.full((n, n), -torch.inf).triu(1)[None, None] if n > 1 else None
                hidden = block(
                    hidden,
                    attention_mask=mask,
                    position_ids=at,
                    past_key_values=caches,
                    use_cache=True,
                    position_embeddings=decoder.rotary_emb(hidden, at),
                )
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            logits = vlm.components.head(decoder.norm(hidden)[:, -1])
            found.append(logits)
            token = logits.argmax(dim=-1)
            states = decoder.get_input_embeddings()(token)[:, None]
            next_positions = next_positions + 1
            rotary = next_positions
    return found


@pytest.mark.parametrize("layer", [0, 1])
def test_dropping_is_the_shortened_sequence(model: Any, layer: int) -> None:
    vlm, inputs = model
    method: Any = Every3rd()
    if layer:
        method.where, method.layer = "layer", layer
    positions = image_positions(vlm.model.config, inputs)
    gone = set(positions.tolist()) - set(positions[::3].tolist())
    order = torch.tensor([i for i in range(inputs["input_ids"].shape[1]) if i not in gone])
    reducer = Reducer(vlm, method, 1 / 3)
    found = generate(vlm, inputs, reducer)
    torch.testing.assert_close(found, by_hand(vlm, inputs, order, layer), rtol=1e-5, atol=1e-5)
    assert reducer.kept == len(positions[::3])
    # and dropping matters: the test could fail
    assert not torch.allclose(found[0], generate(vlm, inputs)[0], atol=1e-5)
