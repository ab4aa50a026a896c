"""Equality with the reference, number by number; tolerances are the reference's own."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode

from vlm_latency.errors import UserError
from vlm_latency.molmo import MolmoConfig, MolmoForConditionalGeneration

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("family", "DOE")
@torch.no_grad()
def test_float32_equals_the_reference(family, golden):
    model = golden.model(family)
    for n in golden.cases(family):
        inputs, expected = golden.case(family, n)
        routers = {"output_router_logits": True} if family == "E" else {}
        output = model(**inputs, **routers)
        real = inputs["attention_mask"].bool()

        def close(found, name, atol, n=n, expected=expected):
            torch.testing.assert_close(
                found, expected[name], atol=atol, rtol=0, msg=lambda m: f"case {n} {name}: {m}"
            )

        torch.testing.assert_close(output.logits[real], expected["logits"][real], atol=1e-4, rtol=0)
        if "pixel_values" in inputs:
            features = model.get_image_features(inputs["pixel_values"], inputs["image_masks"])
            if "vit_features" in expected:
                close(features.last_hidden_state, "vit_features", 1e-5)
            if "connector" in expected:
                close(features.pooler_output, "connector", 5e-5)
                assert torch.equal(output.image_hidden_states, features.pooler_output)
        if "router_logits" in expected and n != 7:
            found = torch.stack([router.view(*real.shape, -1) for router in output.router_logits])
            torch.testing.assert_close(
                found[:, real], expected["router_logits"][:, real], atol=1e-4, rtol=0
            )


@pytest.mark.parametrize("family", "DOE")
@torch.no_grad()
def test_eager_attention(family, committed):
    folder = committed.models / family
    model = MolmoForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    assert model.model.vision_tower.config._attn_implementation == "eager"
    inputs, expected = committed.case(family, 3)
    logits = model.eval()(**inputs).logits
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", "DOE")
@torch.no_grad()
def test_bfloat16_is_as_close_as_the_reference(family, golden):
    folder = golden.models / family
    model = MolmoForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    files = (golden.folder / family).glob("case_?_bf16.safetensors")
    for n in sorted(int(file.name[5]) for file in files):
        inputs, expected = golden.case(family, n)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        error = (model(**inputs).logits.float() - expected["logits"]).abs().mean()
        reference = (golden.bfloat16_logits(family, n).float() - expected["logits"]).abs().mean()
        # In bfloat16 a token may be routed to another expert, which one rounding decides.
        assert error < (2 if family == "E" else 1.25) * reference


@torch.no_grad()
def test_text_without_mask_or_image_or_padding(committed):
    model = committed.model("O")
    inputs, expected = committed.case("O", 0)
    logits = model(input_ids=inputs["input_ids"]).logits
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    assert torch.equal(model(inputs_embeds=embeds).logits, logits)
    last = model(input_ids=inputs["input_ids"], logits_to_keep=2).logits
    torch.testing.assert_close(last, logits[:, -2:])


@torch.no_grad()
def test_a_crop_is_empty_only_if_all_its_values_are_minus_one(committed):
    model = committed.model("E")
    pixels = torch.full((1, 2, 36, 588), -1.0)
    pixels[0, 1, 0, 0] = 0
    features = model.get_image_features(pixels, torch.ones(1, 2, 36)).last_hidden_state
    assert not features[0, 0].any()
    assert features[0, 1].any(dim=-1).all()


class AttentionTypes(TorchFunctionMode):
    """Notes the data type of every scaled dot product attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.seen.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("float32", [True, False])
@torch.no_grad()
def test_float32_attention_is_an_option(float32, committed):
    model = MolmoForConditionalGeneration.from_pretrained(
        committed.models / "D", dtype=torch.bfloat16, float32_attention=float32
    ).eval()
    assert model.config.float32_attention is float32
    inputs, _ = committed.case("D", 2)
    with AttentionTypes() as types:
        model.get_image_features(inputs["pixel_values"], inputs["image_masks"])
    expected = torch.float32 if float32 else torch.bfloat16
    assert types.seen == [expected] * (10 + 1)  # ten blocks and the pooling


@torch.no_grad()
def test_float32_attention_under_flash_attention_runs_sdpa(committed):
    model = MolmoForConditionalGeneration.from_pretrained(committed.models / "D").eval()
    inputs, expected = committed.case("D", 2)
    model.config.vision_config._attn_implementation_internal = "flash_attention_2"
    features = model.get_image_features(inputs["pixel_values"], inputs["image_masks"])
    torch.testing.assert_close(features.pooler_output, expected["connector"], atol=5e-5, rtol=0)


def test_experts_of_odd_widths_in_bfloat16():
    text = {
        "model_type": "olmoe",
        "vocab_size": 384,
        "hidden_size": 36,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    vision |= {"num_hidden_layers": 9, "image_size": 84}
    config = MolmoConfig(text_config=text, vision_config=vision, overlap_margins=(2, 2))
    model = MolmoForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()
    assert config.text_config._experts_implementation == "batched_mm"
    with torch.no_grad():
        assert model(input_ids=torch.arange(20)[None]).logits.isfinite().all()


def test_even_experts_run_grouped(committed):
    assert committed.model("E").config.text_config._experts_implementation == "grouped_mm"


def test_says_what_is_missing(committed):
    model = committed.model("D")
    with pytest.raises(UserError, match="input_ids or inputs_embeds"):
        model()
    inputs, _ = committed.case("D", 2)
    del inputs["image_input_idx"]
    with pytest.raises(UserError, match="without image_input_idx"):
        model(**inputs)


def test_the_parts_have_their_usual_names(committed):
    model = committed.model("D")
    assert [name for name, _ in model.base_model.named_children()] == [
        "vision_tower",
        "multi_modal_projector",
        "language_model",
    ]
    assert model.get_encoder(modality="image") is model.model.vision_tower
    assert model.get_decoder() is model.model.language_model
    assert model.get_output_embeddings() is model.lm_head
    assert model.get_input_embeddings() is model.model.language_model.embed_tokens
    assert model.lm_head.out_features == 256
