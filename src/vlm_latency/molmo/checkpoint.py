"""Between the hub's state-dict names and ours, and a check that every tensor is there.

The published files fuse what transformers keeps apart: ``att_proj`` holds the rows of q, k and v,
``ff_proj`` those of the up and then of the gate projection, and the embedding lies in two tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import safe_open
from transformers.core_model_loading import (
    Concatenate,
    Split,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)

from vlm_latency.errors import ModelError
from vlm_latency.molmo.configuration import MolmoConfig

_HUB_PREFIX = "model.transformer."

# The two norms of a block by family: before attention and MLP, or (OLMo 2) after them.
_NORMS = {
    "qwen2": ("input_layernorm", "post_attention_layernorm"),
    "olmoe": ("input_layernorm", "post_attention_layernorm"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
}


def is_hub_format(names: Iterable[str]) -> bool:
    """Say whether these are the hub's state-dict names rather than ours."""
    return any(name.startswith(_HUB_PREFIX) for name in names)


def hub_conversions(config: MolmoConfig) -> list[WeightTransform]:
    """List renames and conversions from the hub's tensors to ours, in the order of application.

    Experts are renamed only: transformers merges those of an OLMoE by itself.
    """
    attention_norm, mlp_norm = _NORMS[config.text_config.model_type]
    block = r"^model\.transformer\.blocks\.(\d+)\."
    layer = r"model.language_model.layers.\1."
    backbone = r"^model\.vision_backbone\."
    vit_block = backbone + r"image_vit\.transformer\.resblocks\.(\d+)\."
    vit_layer = r"model.vision_tower.layers.\1."
    connector = "model.multi_modal_projector."
    renames = {
        r"^model\.transformer\.ln_f\.": "model.language_model.norm.",
        r"^model\.transformer\.ff_out\.": "lm_head.",
        block + r"(?:attn\.)?attn_norm\.": f"{layer}{attention_norm}.",
        block + r"(?:mlp\.)?ff_norm\.": f"{layer}{mlp_norm}.",
        block + r"(?:attn\.)?attn_out\.": f"{layer}self_attn.o_proj.",
        block + r"(?:attn\.)?q_norm\.": f"{layer}self_attn.q_norm.",
        block + r"(?:attn\.)?k_norm\.": f"{layer}self_attn.k_norm.",
        block + r"(?:attn\.)?att_proj\.": f"{layer}self_attn.att_proj.",
        block + r"ff_proj\.": f"{layer}mlp.ff_proj.",
        block + r"ff_out\.": f"{layer}mlp.down_proj.",
        block + r"mlp\.": f"{layer}mlp.",
        vit_block + r"attention\.wq\.": f"{vit_layer}self_attn.q_proj.",
        vit_block + r"attention\.wk\.": f"{vit_layer}self_attn.k_proj.",
        vit_block + r"attention\.wv\.": f"{vit_layer}self_attn.v_proj.",
        vit_block + r"attention\.wo\.": f"{vit_layer}self_attn.out_proj.",
        vit_block + r"attention_norm\.": f"{vit_layer}layer_norm1.",
        vit_block + r"ffn_norm\.": f"{vit_layer}layer_norm2.",
        vit_block + r"feed_forward\.w1\.": f"{vit_layer}mlp.fc1.",
        vit_block + r"feed_forward\.w2\.": f"{vit_layer}mlp.fc2.",
        backbone + r"image_vit\.class_embedding": "model.vision_tower.class_embedding",
        backbone + r"image_vit\.positional_embedding": "model.vision_tower.position_embedding",
        backbone + r"image_vit\.patch_embedding\.": "model.vision_tower.patch_embedding.",
        backbone + r"image_vit\.pre_ln\.": "model.vision_tower.pre_layernorm.",
        backbone + r"pad_embed": f"{connector}pad_embed",
        backbone + r"image_pooling_2d\.wq\.": f"{connector}pooling.q_proj.",
        backbone + r"image_pooling_2d\.wk\.": f"{connector}pooling.k_proj.",
        backbone + r"image_pooling_2d\.wv\.": f"{connector}pooling.v_proj.",
        backbone + r"image_pooling_2d\.wo\.": f"{connector}pooling.out_proj.",
        backbone + r"image_projector\.w1\.": f"{connector}gate_proj.",
        backbone + r"image_projector\.w2\.": f"{connector}down_proj.",
        backbone + r"image_projector\.w3\.": f"{connector}up_proj.",
    }
    conversions: list[WeightTransform] = [
        WeightRenaming(hub, ours) for hub, ours in renames.items()
    ]
    conversions += [
        WeightConverter(
            f"self_attn.att_proj.{kind}",
            [f"self_attn.{name}_proj.{kind}" for name in "qkv"],
            operations=[Split(dim=0)],
        )
        for kind in ("weight", "bias")
    ]
    conversions.append(
        WeightConverter(
            "mlp.ff_proj.weight",
            ["mlp.up_proj.weight", "mlp.gate_proj.weight"],
            operations=[Split(dim=0)],
        )
    )
    conversions.append(
        WeightConverter(
            ["model.transformer.wte.embedding", "model.transformer.wte.new_embedding"],
            "model.language_model.embed_tokens.weight",
            operations=[Concatenate(dim=0)],
        )
    )
    return conversions


def hub_tensors(config: MolmoConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint in the hub's format."""
    return _hub_decoder(config) | _hub_backbone(config)


def _hub_decoder(config: MolmoConfig) -> dict[str, tuple[int, ...]]:
    text = config.text_config
    width, mlp = text.hidden_size, text.intermediate_size
    head = width // text.num_attention_heads
    keys = text.num_key_value_heads * head
    qkv = text.num_attention_heads * head + 2 * keys
    moe = text.model_type == "olmoe"

    shapes: dict[str, tuple[int, ...]] = {
        "model.transformer.wte.embedding": (config.head_size, width),
        "model.transformer.wte.new_embedding": (config.additional_vocab_size, width),
        "model.transformer.ln_f.weight": (width,),
        "lm_head.weight" if moe else "model.transformer.ff_out.weight": (config.head_size, width),
    }
    for index in range(text.num_hidden_layers):
        block = f"model.transformer.blocks.{index}."
        attention = f"{block}attn." if moe else block
        shapes[f"{attention}att_proj.weight"] = (qkv, width)
        shapes[f"{attention}attn_out.weight"] = (width, width)
        shapes[f"{attention}attn_norm.weight"] = (width,)
        if text.model_type == "qwen2":
            shapes[f"{attention}att_proj.bias"] = (qkv,)
        else:
            shapes[f"{attention}q_norm.weight"] = (width,)
            shapes[f"{attention}k_norm.weight"] = (keys,)
        if moe:
            shapes[f"{block}mlp.ff_norm.weight"] = (width,)
            shapes[f"{block}mlp.gate.weight"] = (text.num_experts, width)
            for expert in range(text.num_experts):
                name = f"{block}mlp.experts.{expert}."
                shapes[f"{name}gate_proj.weight"] = (mlp, width)
                shapes[f"{name}up_proj.weight"] = (mlp, width)
                shapes[f"{name}down_proj.weight"] = (width, mlp)
        else:
            shapes[f"{block}ff_norm.weight"] = (width,)
            shapes[f"{block}ff_proj.weight"] = (2 * mlp, width)
            shapes[f"{block}ff_out.weight"] = (width, mlp)
    return shapes


def _hub_backbone(config: MolmoConfig) -> dict[str, tuple[int, ...]]:
    text, vision = config.text_config, config.vision_config
    width, mlp = vision.hidden_size, vision.intermediate_size
    features = width * len(config.vision_feature_layers)
    linear: dict[str, tuple[int, int]] = {}  # layers with a bias
    norms = ["image_vit.pre_ln"]
    for index in range(vision.num_hidden_layers):
        block = f"image_vit.transformer.resblocks.{index}."
        linear |= {f"{block}attention.{name}": (width, width) for name in ("wq", "wk", "wv", "wo")}
        linear[f"{block}feed_forward.w1"] = (mlp, width)
        linear[f"{block}feed_forward.w2"] = (width, mlp)
        norms += [f"{block}attention_norm", f"{block}ffn_norm"]
    linear |= {f"image_pooling_2d.{name}": (width, features) for name in ("wq", "wk", "wv")}
    linear["image_pooling_2d.wo"] = (width, width)

    shapes: dict[str, tuple[int, ...]] = {
        "image_vit.class_embedding": (width,),
        "image_vit.positional_embedding": (config.num_patches_per_side**2 + 1, width),
        "image_vit.patch_embedding.weight": (width, 3 * vision.patch_size**2),
        "pad_embed": (2, features),
        "image_projector.w1.weight": (text.intermediate_size, width),
        "image_projector.w2.weight": (text.hidden_size, text.intermediate_size),
        "image_projector.w3.weight": (text.intermediate_size, width),
    }
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return {f"model.vision_backbone.{name}": shape for name, shape in shapes.items()}


def tensor_shapes(
    state_dict: Mapping[str, Any] | None, files: Iterable[str] | None
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor given, or of those in safetensors files (headers only)."""
    if state_dict is not None:
        return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files or ():
        if not file.endswith(".safetensors"):
            raise ModelError(f"{file} is not a safetensors file: convert the checkpoint first.")
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
    return shapes


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def check_tensors(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Check that every expected tensor is there in its shape, and no other.

    Raises
    ------
    ModelError
        Naming the tensors that are missing, unexpected or of another shape.
    """
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"missing {_few(missing)}")
    if unexpected := sorted(found.keys() - expected.keys()):
        problems.append(f"unexpected {_few(unexpected)}")
    if misshapen := [
        f"{name} {found[name]} instead of {shape}"
        for name, shape in sorted(expected.items())
        if name in found and found[name] != shape
    ]:
        problems.append(f"of another shape {_few(misshapen)}")
    if problems:
        raise ModelError(
            f"The weights in {source} do not fit its configuration: {'; '.join(problems)}. "
            "Check that config.json and the weights belong together and are complete."
        )


def expected_tensors(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint in our own format."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
