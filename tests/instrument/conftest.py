"""Tiny models of several families with random weights, wrapped as loaded models."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from vlm_latency.models.components import find_components

IMAGE = 5  # the placeholder's id in every tiny vocabulary


@dataclass(frozen=True)
class Prepared:
    inputs: dict[str, torch.Tensor]
    counts: Any = None


def tiny(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A tiny model of a family, and the inputs of one request with an image."""
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
    }
    config, tokens, extra = FAMILIES[name](text, vision)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    ids = torch.tensor([[1, *[IMAGE] * tokens, 10, 11, 12]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **extra}
    if name == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    return model, inputs


def _llava(text: dict, vision: dict) -> tuple[Any, int, dict]:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**text),
        image_token_id=IMAGE,
    )
    return config, 16, {"pixel_values": torch.rand(1, 3, 16, 16)}


def _qwen(text: dict, vision: dict) -> tuple[Any, int, dict]:
    from transformers import Qwen2_5_VLConfig

    config = Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}},
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4,
            "out_hidden_size": 32, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8,
    )  # fmt: skip
    pixels = torch.rand(64, 3 * 2 * 4 * 4)
    return config, 16, {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 8, 8]])}


def _internvl(text: dict, vision: dict) -> tuple[Any, int, dict]:
    from transformers import InternVLConfig, Qwen2Config

    config = InternVLConfig(
        vision_config={**vision, "image_size": [16, 16], "patch_size": [4, 4]},
        text_config=Qwen2Config(**text),
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    return config, 4, {"pixel_values": torch.rand(1, 3, 16, 16)}


def _smolvlm(text: dict, vision: dict) -> tuple[Any, int, dict]:
    from transformers import LlamaConfig, SmolVLMConfig

    config = SmolVLMConfig(
        vision_config=vision, text_config=LlamaConfig(**text), image_token_id=IMAGE, scale_factor=2
    )
    return config, 4, {"pixel_values": torch.rand(1, 1, 3, 16, 16)}


FAMILIES = {"llava": _llava, "qwen2_5_vl": _qwen, "internvl": _internvl, "smolvlm": _smolvlm}


def set_threads(count: int) -> int:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    return before


def wrap(name: str) -> tuple[Any, Prepared]:
    """A tiny model as the instrument sees it, and one prepared request."""
    model, inputs = tiny(name)
    vlm = SimpleNamespace(
        model=model,
        components=find_components(model).resolve(model),
        device=torch.device("cpu"),
        dtype=torch.float32,
        meter=lambda make: make(vlm),
        set_threads=set_threads,
    )
    return vlm, Prepared(inputs)


@pytest.fixture(params=[*FAMILIES])
def family(request: pytest.FixtureRequest) -> tuple[Any, Prepared]:
    return wrap(request.param)


@pytest.fixture
def qwen() -> tuple[Any, Prepared]:
    """A family whose projector lies inside its encoder."""
    return wrap("qwen2_5_vl")


@pytest.fixture
def llava() -> tuple[Any, Prepared]:
    return wrap("llava")
