"""The configuration of a Molmo v1 model, read from the hub's own keys or from ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, CLIPVisionConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from vlm_latency.errors import ModelError

# End-of-text of the published tokenizers, by the hub's `vocab_size`; the hub's config.json files do
# not tell it. Molmo puts it in front of every prompt, too.
_END_OF_TEXT = {152064: 151643, 100278: 100257, 50280: 50279}

# Keys of a hub config.json that are read or that say nothing the architecture does not.
_HUB_VISION = {
    "image_emb_dim": "hidden_size",
    "image_mlp_dim": "intermediate_size",
    "image_num_layers": "num_hidden_layers",
    "image_num_heads": "num_attention_heads",
    "image_patch_size": "patch_size",
    "image_mlp_activations": "hidden_act",
    "image_norm_eps": "layer_norm_eps",
}


def _first(keys: Mapping[str, Any], *names: str) -> Any:
    """The first of these keys that is there and not null."""
    return next((keys[name] for name in names if keys.get(name) is not None), None)


def _text_config_from_hub(keys: Mapping[str, Any]) -> dict[str, Any]:
    hidden_size = _first(keys, "hidden_size", "d_model")
    heads = _first(keys, "num_attention_heads", "n_heads")
    # The hub counts both branches of the gated MLP; E's key for it is a ratio to the width.
    fused = _first(keys, "intermediate_size", "mlp_hidden_size") or keys["mlp_ratio"] * hidden_size
    text = {
        "vocab_size": keys["embedding_size"] + keys["additional_vocab_size"],
        "hidden_size": hidden_size,
        "intermediate_size": fused // 2,
        "num_hidden_layers": _first(keys, "num_hidden_layers", "n_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": _first(keys, "num_key_value_heads", "n_kv_heads") or heads,
        "rms_norm_eps": keys["layer_norm_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": keys["rope_theta"]},
        "max_position_embeddings": keys["max_position_embeddings"],
    }
    if keys.get("block_type") == "moe":
        text |= {
            "model_type": "olmoe",
            "num_experts": keys["moe_num_experts"],
            "num_experts_per_tok": keys["moe_top_k"],
            "norm_topk_prob": False,
        }
    elif keys.get("norm_after"):
        text["model_type"] = "olmo2"
    elif keys.get("qkv_bias"):
        text["model_type"] = "qwen2"
    else:
        raise ModelError(
            "This Molmo config.json is of no known family: expected block_type 'moe' (MolmoE-1B), "
            "norm_after true (Molmo-7B-O) or qkv_bias true (Molmo-7B-D, 72B)."
        )
    return text


def _from_hub(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields from the keys of a hub config.json."""
    backbone = keys.get("vision_backbone") or {}
    vision = {ours: backbone[hub] for hub, ours in _HUB_VISION.items() if hub in backbone}
    if "image_default_input_size" in backbone:
        vision["image_size"] = backbone["image_default_input_size"][0]
    first_special = keys["vocab_size"]
    end_of_text = _END_OF_TEXT.get(keys["vocab_size"])
    return {
        "text_config": _text_config_from_hub(keys),
        "vision_config": vision,
        "image_start_token_id": first_special,
        "image_end_token_id": first_special + 1,
        "image_token_id": first_special + 2,
        "image_col_token_id": first_special + 3,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
    }


class MolmoConfig(PreTrainedConfig):
    """What a Molmo v1 model is made of.

    ``MolmoConfig.from_pretrained(folder)`` and ``MolmoConfig(**keys)`` take the keys of a published
    ``config.json`` (known by ``embedding_size``) or the fields below. A published configuration
    without ``vision_backbone`` (7B-D, 7B-O, 72B) has the published ViT.

    Parameters
    ----------
    text_config
        A Qwen2, OLMo 2 or OLMoE configuration, or its keys with ``model_type``. Its ``vocab_size``
        counts the rows of the joined embedding table, `additional_vocab_size` of them for tokens
        that the head never gives.
    vision_config
        A CLIP vision configuration or its keys; default ViT-L/14 at 336 px with 23 blocks.
    additional_vocab_size
        Embedding rows without an output of the head.
    vision_feature_layers
        Blocks whose outputs are concatenated, counted from the last.
    max_crops, overlap_margins
        Tiles at most (the global crop not counted) and the margins of a crop in patches.
    float32_attention
        Whether attention in the ViT and in the pooling is computed in float32, as the reference
        does.
    image_start_token_id, image_end_token_id, image_token_id, image_col_token_id
        Ids of ``<im_start>``, ``<im_end>``, ``<im_patch>`` and ``<im_col>``; by default the first
        four that the head does not give.
    bos_token_id, eos_token_id
        End of text, which also begins every prompt.
    """

    model_type = "molmo"
    sub_configs_defaults = {  # noqa: RUF012 (the base class's convention)
        "vision_config": SubConfigSpec(config_class=CLIPVisionConfig),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2"),
    }

    text_config: Any = None
    vision_config: Any = None
    additional_vocab_size: int = 128
    vision_feature_layers: list[int] | tuple[int, ...] = (-2, -9)
    max_crops: int = 12
    overlap_margins: list[int] | tuple[int, ...] = (4, 4)
    float32_attention: bool = True
    image_start_token_id: int | None = None
    image_end_token_id: int | None = None
    image_token_id: int | None = None
    image_col_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if "embedding_size" in kwargs:
            kwargs["additional_vocab_size"] = self.additional_vocab_size
            for name, value in _from_hub(kwargs).items():
                if getattr(self, name) is None:
                    setattr(self, name, value)
            self.vision_feature_layers = kwargs.get("vit_layers", self.vision_feature_layers)
            kept = ("architectures", "dtype", "torch_dtype", "name_or_path", "attn_implementation")
            kwargs = {name: kwargs[name] for name in kept if name in kwargs}
        if self.vision_config is None or isinstance(self.vision_config, dict):
            self.vision_config = {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 23,
                "num_attention_heads": 16,
                "image_size": 336,
                "patch_size": 14,
            } | (self.vision_config or {})
        if isinstance(self.text_config, dict):
            # OLMo configurations bring a padding and an end token of their own.
            self.text_config = {"pad_token_id": None, "eos_token_id": None} | self.text_config
        super().__post_init__(**kwargs)
        if self.text_config.model_type not in ("qwen2", "olmo2", "olmoe"):
            raise ModelError(
                f"A Molmo v1 decoder is of model_type qwen2, olmo2 or olmoe, not "
                f"{self.text_config.model_type!r}."
            )
        names = ("image_start", "image_end", "image", "image_col")
        for offset, name in enumerate(names):
            if getattr(self, f"{name}_token_id") is None:
                setattr(self, f"{name}_token_id", self.head_size + offset)

    @property
    def head_size(self) -> int:
        """Outputs of the head: the rows of the embedding less the additional ones."""
        return self.text_config.vocab_size - self.additional_vocab_size

    @property
    def num_patches_per_side(self) -> int:
        """Patches along one side of a crop."""
        return self.vision_config.image_size // self.vision_config.patch_size
