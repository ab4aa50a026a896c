"""What a walk over modules knows: layers that wrap layers, experts, recurrences, other decoders."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from vlm_latency.costs import CostModel, RequestShape, add_costs
from vlm_latency.costs.census import take_census
from vlm_latency.costs.counted import Counter
from vlm_latency.errors import UserError
from vlm_latency.models.components import Components, count_parameters, find_components

SHAPE = RequestShape(336, 336, 600, 576, 1, 576, 4)
TEXT = RequestShape(0, 0, 90, 0, 0, 0, 4)
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 512,
}
SMALL_VISION = {"hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def llava() -> Any:
    from vlm_latency import load_model

    return load_model("tiny-llava")


def costs_of(vlm: Any, model: Any) -> CostModel:
    from vlm_latency.models.loading import VLM

    return CostModel(VLM.from_objects(model, vlm.preparer.processor).architecture)


def made(kind: str, config: Any) -> Any:
    import torch
    import transformers

    with torch.device("meta"):
        return getattr(transformers, kind)._from_config(config, attn_implementation="sdpa").eval()


class Alone:
    """What `CostModel` asks of an architecture that has no processor."""

    simulated = False
    name = "alone"

    def __init__(self, model: Any) -> None:
        self.model = model
        self.model_type = model.config.model_type
        self.components = find_components(model)
        self.parameters = count_parameters(model, self.components)

    def meta_model(self) -> Any:
        return self.model


@pytest.mark.parametrize("how", ["in place", "wrapped", "off", "merged", "two, one active"])
def test_adapters_cost_what_runs(llava: Any, how: str) -> None:
    """Peft's LoRA on four linear layers of the decoder: rank × (in + out) beside each."""
    from peft import LoraConfig, get_peft_model

    plain = costs_of(llava, llava.model).flops(TEXT)
    model = copy.deepcopy(llava.model)
    targets = r".*language_model.*\.(q_proj|v_proj|up_proj|down_proj)"
    config = LoraConfig(r=4, target_modules=targets)
    if how == "in place":
        model.add_adapter(config, adapter_name="mine")
    else:
        model = get_peft_model(model, config)
    if how == "off":
        model.base_model.disable_adapter_layers()
    if how == "merged":
        model.base_model.merge_adapter()
    if how == "two, one active":
        model.add_adapter("other", LoraConfig(r=16, target_modules=targets))
    costs = costs_of(llava, model)
    widths = 2 * (64 + 64) + (64 + 128) + (128 + 64)
    extra = 0 if how in ("off", "merged") else 4 * 2 * 4 * widths
    found = costs.flops(TEXT)
    assert costs.census.unknown == ()
    assert found["llm_prefill"] == plain["llm_prefill"] + extra * 90
    assert found["llm_decode"] == plain["llm_decode"] + extra * 3
    assert found == costs.flops(TEXT, "counted")


def test_adapters_are_measured_with_their_costs(llava: Any) -> None:
    from peft import LoraConfig
    from PIL import Image

    from vlm_latency import measure
    from vlm_latency.models.loading import VLM

    model = copy.deepcopy(llava.model)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), adapter_name="mine")
    vlm = VLM.from_objects(model, llava.preparer.processor)
    image = Image.effect_noise((300, 200), 50)
    table = measure(vlm, [(image, "What?")], num_runs=1, output_length=3, warmup_runs=0)
    row = add_costs(pd.DataFrame(table), vlm.architecture, dtype="float32").iloc[0]
    assert row.status == "ok"
    assert row.flops_total_analytic == row.flops_total_counted
    assert pd.isna(row.costs_note)


def test_a_parametrised_weight_is_a_weight(llava: Any) -> None:
    from torch import nn
    from torch.nn.utils.parametrizations import weight_norm
    from torch.nn.utils.parametrize import register_parametrization

    model = copy.deepcopy(llava.model)
    weight_norm(model.model.language_model.layers[0].mlp.up_proj)
    costs = costs_of(llava, model)
    assert costs.census.unknown == ()
    assert costs.flops(SHAPE) == costs_of(llava, llava.model).flops(SHAPE)
    assert costs.flops(SHAPE) == costs.flops(SHAPE, "counted")

    class Low(nn.Module):  # a product that makes the weight
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)

        def forward(self, weight: Any) -> Any:
            return weight + self.up(self.down(weight))

    register_parametrization(model.model.language_model.layers[1].mlp.up_proj, "weight", Low())
    unknown = costs_of(llava, model).census.unknown
    assert unknown == (
        "model.language_model.layers.*.mlp.up_proj.parametrizations (products that make a weight)",
    )


def test_a_layer_packed_into_fewer_bits_counts_by_its_widths(llava: Any) -> None:
    """What quantisers put in a linear layer's place: a packed weight, scales, two widths."""
    import torch
    from torch import nn

    class Packed(nn.Module):
        def __init__(self, like: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = like.in_features, like.out_features
            self.register_buffer("qweight", torch.zeros(like.weight.numel() // 2, 1).byte())
            self.scales = nn.Parameter(torch.ones(like.out_features, like.in_features // 32))

    model = copy.deepcopy(llava.model)
    plain = costs_of(llava, model).flops(SHAPE)
    for layer in model.model.language_model.layers:
        layer.mlp.up_proj = Packed(layer.mlp.up_proj)
    assert costs_of(llava, model).flops(SHAPE) == plain


@pytest.mark.parametrize("whole", ["model", ""])
def test_each_module_belongs_to_the_innermost_component(llava: Any, whole: str) -> None:
    """A decoder that holds the encoder, the projector and, where it is the whole model, the head."""
    parts = Components(
        "model.vision_tower", ("model.multi_modal_projector",), "model.language_model", "lm_head"
    )
    nested = Components("model.vision_tower", ("model.multi_modal_projector",), whole, "lm_head")
    found, right = (take_census(llava.model, one, "llava") for one in (nested, parts))
    for part in ("vision", "projector", "llm", "head"):
        assert getattr(found, part).flops == getattr(right, part).flops
        assert getattr(found, part).weights == getattr(right, part).weights
    inner = Components(
        "model.vision_tower",
        ("model.vision_tower.encoder.layers.3",),
        "model.language_model",
        "lm_head",
    )
    shared = take_census(llava.model, inner, "llava")
    both = shared.vision.weights + shared.projector.weights
    assert both == right.vision.weights


def test_a_recurrence_is_named_and_counted() -> None:
    """Three gated-delta layers to one of attention, as in Qwen3.5."""
    from transformers import Qwen3_5Config

    text = {
        **SMALL,
        "head_dim": 16,
        "num_hidden_layers": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    }
    vision = {**SMALL_VISION, "patch_size": 14, "out_hidden_size": 64}
    model = made(
        "Qwen3_5ForConditionalGeneration", Qwen3_5Config(text_config=text, vision_config=vision)
    )
    costs = CostModel(Alone(model))
    assert "linear_attn" in costs.unknown["llm_prefill"]
    assert pd.isna(costs.flops(TEXT)["llm_prefill"])
    assert pd.isna(costs.kv_cache_bytes(TEXT, "float32"))
    table = pd.DataFrame(
        [{**vars(TEXT), "num_total_tokens": n} for n in (63, 64, 65, 90, 128, 129)]
    )
    found = add_costs(table, costs.architecture, dtype="float32")
    slow = Counter(model, costs.architecture.components, equal_blocks=False)
    assert found.flops_llm_prefill.tolist() == [
        slow.prefill(n).flops for n in table.num_total_tokens
    ]
    assert found.flops_llm_decode.iloc[0] == sum(slow.step(63 + t).flops for t in range(3))
    assert found.flops_llm_prefill_analytic.isna().all()
    assert found.costs_note.str.contains("linear_attn.*is the counted number").all()


def test_a_token_visits_the_experts_of_its_kind() -> None:
    """Two sets of experts in a layer, as in ERNIE 4.5 VL: eight, of which two are visited."""
    from transformers import AutoConfig

    base = AutoConfig.for_model("ernie4_5_vl_moe")
    text = type(base.text_config)(
        **SMALL,
        moe_num_experts=8,
        moe_k=2,
        moe_intermediate_size=[48, 16],
        moe_num_shared_experts=1,
        mlp_layer_types=["dense", "sparse"],
        rope_parameters={"rope_type": "default", "rope_theta": 5e5, "mrope_section": [3, 3, 2]},
    )
    vision = type(base.vision_config)(**SMALL_VISION)
    model = made(
        "Ernie4_5_VLMoeForConditionalGeneration",
        type(base)(text_config=text, vision_config=vision),
    )
    costs = CostModel(Alone(model))
    per_width = 2 * 3 * 64  # gate, up and down
    tokens = costs.census.llm.flops
    assert tokens["vision_token"] == 2 * per_width * (16 - 48)
    counted = Counter(model, costs.architecture.components)
    assert costs.flops(TEXT)["llm_prefill"] == counted.prefill(90).flops
    sizes = costs.architecture.parameters
    of_text, of_image = 8 * 3 * 64 * 48, 8 * 3 * 64 * 16
    assert sizes.params_llm - sizes.params_llm_active == of_text * 6 // 8 + of_image
    assert (sizes.moe_num_experts, sizes.moe_top_k) == (8, 2)


def test_a_decoder_that_attends_to_the_image_has_no_costs() -> None:
    from transformers import MllamaConfig

    text = {
        **SMALL,
        "num_hidden_layers": 4,
        "cross_attention_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
    }
    config = MllamaConfig(text_config=text, vision_config=vision)
    costs = CostModel(Alone(made("MllamaForConditionalGeneration", config)))
    table = add_costs(pd.DataFrame([vars(SHAPE)]), costs.architecture, dtype="float32").iloc[0]
    for column in ("flops_vision", "flops_llm_prefill", "flops_total", "bytes_llm_decode"):
        assert pd.isna(table[column])
    for column in ("flops_total_counted", "predicted_kv_cache_bytes", "launches_total"):
        assert pd.isna(table[column])
    assert "attends to the image from within the decoder" in table.costs_note
    assert table.flops_total_rule > 0


def test_a_model_of_no_known_form_is_refused_in_words(llava: Any) -> None:
    class Headless(Alone):
        def __init__(self) -> None:
            self.model = llava.model
            self.model_type = "llava"
            self.components = Components("model.vision_tower", (), "model.language_model", "model")
            self.parameters = count_parameters(self.model, self.components)

    with pytest.raises(UserError, match="costs of model_type 'llava' are not known"):
        _ = CostModel(Headless()).census
    table = add_costs(pd.DataFrame([vars(SHAPE)]), Headless(), hardware="H100", dtype="float32")
    assert table.filter(regex="^(flops|bytes|launches|roofline|predicted)_").isna().all(axis=None)
    assert "are not known" in table.costs_note[0]


def test_parts_that_are_not_the_whole_are_told(
    zoo_costs: Callable[[str], CostModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second pass through the decoder's head, say, which no component shows."""
    from vlm_latency.costs.blocks import Count

    exact = Counter.whole
    monkeypatch.setattr(Counter, "whole", lambda *given: exact(*given) + Count(flops=1000))
    architecture = copy.copy(zoo_costs("tiny-llava").architecture)
    architecture.own_modules = True  # remembered nowhere
    table = add_costs(pd.DataFrame([vars(SHAPE)]), architecture, dtype="float32")
    assert table[["flops_total", "flops_total_counted", "bytes_total"]].isna().all(axis=None)
    assert "a whole forward costs" in table.costs_note[0]


def test_verdicts(llava: Any, zoo_costs: Callable[[str], CostModel]) -> None:
    from vlm_latency.costs import verdict

    assert verdict(zoo_costs("tiny-gemma3").architecture).costs == "exact"
    assert verdict(llava.architecture).reason == ""
    unseen = verdict(Alone(llava.model))
    assert (unseen.costs, unseen.reason[:28]) == ("partly", "no image could be prepared: ")
