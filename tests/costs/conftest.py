"""A two-layer model small enough to work its costs out by hand, and the zoo's tiny twins."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from vlm_latency.costs import CostModel

CROP, PATCH = 28, 14  # 2 × 2 patches


class HandArchitecture:
    """LLaVA with two layers everywhere: what `CostModel` asks of an architecture, and no more."""

    model_type = "llava"
    simulated = False

    def __init__(self) -> None:
        import torch
        from transformers import LlavaConfig, LlavaForConditionalGeneration

        config = LlavaConfig(
            vision_config={
                "model_type": "clip_vision_model",
                "hidden_size": 8,
                "intermediate_size": 12,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": CROP,
                "patch_size": PATCH,
            },
            text_config={
                "model_type": "llama",
                "hidden_size": 16,
                "intermediate_size": 20,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": 50,
                "max_position_embeddings": 512,
            },
            image_token_index=49,
            image_seq_length=4,
        )
        with torch.device("meta"):
            self._model = LlavaForConditionalGeneration._from_config(
                config, attn_implementation="sdpa"
            ).eval()
        from vlm_latency.models.components import count_parameters, find_components

        self.components = find_components(self._model)
        self.parameters = count_parameters(self._model, self.components)

    def meta_model(self) -> Any:
        return self._model

    def dummy_inputs(self, width: int, height: int, num_text_tokens: int) -> dict[str, Any]:
        import torch

        return {
            "pixel_values": torch.empty(1, 3, CROP, CROP, device="meta"),
            "input_ids": torch.tensor([[49] * 4 + [1] * num_text_tokens]),
        }

    def image_tokens(self, width: int, height: int) -> Any:
        return SimpleNamespace(
            num_crops=1,
            num_vision_patches=4,
            num_vision_tokens=4,
            num_image_special_tokens=0,
            num_total_tokens=4,
        )


@pytest.fixture(scope="session")
def by_hand() -> CostModel:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return CostModel(HandArchitecture())


@pytest.fixture(scope="session")
def zoo_costs() -> Any:
    """Costs of a model of the zoo by name, made once."""
    made: dict[str, CostModel] = {}

    def costs(name: str) -> CostModel:
        from vlm_latency.models.architecture import describe
        from vlm_latency.options import ModelOptions

        if name not in made:
            made[name] = CostModel(describe(ModelOptions(name=name, weights="random")))
        return made[name]

    return costs
