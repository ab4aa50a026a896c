from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from vlm_latency import molmo
from vlm_latency.errors import ModelError
from vlm_latency.molmo import MolmoConfig, MolmoForConditionalGeneration

COMMITTED = Path(__file__).parent / "golden"
PUBLISHED = json.loads((COMMITTED / "real_sizes.json").read_text())["counts"]
SIZE_72B = {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 2 * 29568,
    "layer_norm_eps": 1e-5,
}


def published_keys(size: str) -> dict:
    family = "D" if size == "72B" else size
    keys = json.loads((COMMITTED / family / "real_config.json").read_text())
    return keys | SIZE_72B if size == "72B" else keys


@pytest.mark.parametrize(
    ("size", "total", "connector"),
    [
        ("E", 7_221_875_712, 11_542_528),
        ("O", 7_665_032_192, 74_981_376),
        ("D", 8_021_025_280, 114_040_832),
        ("72B", 73_308_285_952, 310_124_544),
    ],
)
def test_parameters_of_the_published_sizes(size, total, connector):
    config = MolmoConfig(**published_keys(size))
    with torch.device("meta"):
        model = MolmoForConditionalGeneration(config)

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(model) == total
    assert count(model.model.vision_tower) == 290_909_184
    assert count(model.model.multi_modal_projector) == connector
    if size in PUBLISHED:
        extra = config.additional_vocab_size * config.text_config.hidden_size
        assert PUBLISHED[size]["total"] == total
        # The published grouping counts the additional embedding rows with the connector.
        assert PUBLISHED[size]["connector"] == connector + extra
    if size == "E":
        experts = sum(count(layer.mlp.experts) for layer in model.model.language_model.layers)
        text = config.text_config
        active = total - experts + experts * text.num_experts_per_tok // text.num_experts
        assert active == PUBLISHED["E"]["total_active"] == 1_584_731_136


def test_a_published_configuration_tells_the_rest():
    config = MolmoConfig(**published_keys("D"))
    assert config.text_config.model_type == "qwen2"
    assert config.text_config.vocab_size == 152064 + 128
    assert config.text_config.max_position_embeddings == 4096
    assert config.head_size == 152064
    assert (config.image_start_token_id, config.image_col_token_id) == (152064, 152067)
    assert config.bos_token_id == config.eos_token_id == 151643
    assert config.vision_config.num_hidden_layers == 23
    assert config.float32_attention
    assert MolmoConfig(**published_keys("O")).image_token_id == 100280
    assert MolmoConfig(**published_keys("E")).text_config.max_position_embeddings == 32768


def test_fields_beside_published_keys_win():
    given = {"eos_token_id": 7, "additional_vocab_size": 64, "vit_layers": [-1], "max_crops": 6}
    config = MolmoConfig(**published_keys("E") | given)
    assert (config.bos_token_id, config.eos_token_id) == (50279, 7)
    assert config.text_config.vocab_size == 50304 + 64
    assert config.vision_feature_layers == [-1]
    assert config.max_crops == 6


def test_our_own_keys_with_defaults():
    text = {"model_type": "olmo2", "vocab_size": 384, "hidden_size": 32, "num_attention_heads": 2}
    config = MolmoConfig(text_config=text, vision_config={"num_hidden_layers": 10})
    assert config.head_size == 256
    assert config.image_token_id == 258
    assert config.vision_config.image_size == 336
    assert config.vision_config.num_hidden_layers == 10
    # OLMo 2's own defaults would end generation and blank an embedding row.
    assert config.text_config.eos_token_id is None
    assert config.text_config.pad_token_id is None


def test_saved_and_loaded_again(tmp_path):
    molmo.register()
    config = MolmoConfig(**published_keys("E") | {"float32_attention": False})
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MolmoConfig)
    assert loaded.text_config.to_dict() == config.text_config.to_dict()
    assert loaded.vision_config.to_dict() == config.vision_config.to_dict()
    assert loaded.float32_attention is False
    assert loaded.head_size == 50304
    assert loaded.eos_token_id == 50279


def test_refuses_other_decoders():
    with pytest.raises(ModelError, match="not 'llama'"):
        MolmoConfig(text_config={"model_type": "llama"})
    keys = published_keys("D") | {"qkv_bias": False}
    with pytest.raises(ModelError, match="no known family"):
        MolmoConfig(**keys)


def test_random_weights_by_the_auto_class():
    molmo.register()
    config = MolmoConfig.from_pretrained(COMMITTED / "E")
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    assert isinstance(model, MolmoForConditionalGeneration)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.multi_modal_projector.pad_embed.std() > 0
    assert model.model.vision_tower.position_embedding.std() > 0
