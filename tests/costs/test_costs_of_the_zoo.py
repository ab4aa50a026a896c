"""Arithmetic against PyTorch's counter on every architecture, and against published numbers."""

from collections.abc import Callable

import numpy as np
import pytest

from vlm_latency.costs import CostModel, RequestShape
from vlm_latency.costs.bytes_moved import expected_experts
from vlm_latency.costs.model import TEXT_TOKENS, differences

TINY = (
    "tiny-molmo",
    "tiny-molmo-o",
    "tiny-molmoe",
    "tiny-qwen2.5-vl",
    "tiny-qwen3-vl",
    "tiny-llava",
    "tiny-llava-onevision",
    "tiny-internvl",
    "tiny-smolvlm",
    "tiny-gemma3",
)
IMAGES = ((640, 480), (336, 336), (300, 800))


def shapes_of(costs: CostModel, images: tuple[tuple[int, int], ...] = IMAGES) -> RequestShape:
    """Each image with a short and a long request, and one request without an image."""
    rows = [[0, 0, 21, 0, 0, 0, 9]]
    for width, height in images:
        image = costs.architecture.image_tokens(width, height)
        for text, outputs in ((20, 1), (33, 40)):
            rows.append(
                [
                    width,
                    height,
                    image.num_total_tokens + text,
                    image.num_vision_tokens,
                    image.num_crops,
                    image.num_vision_patches,
                    outputs,
                ]
            )
    return RequestShape(*np.array(rows).T)


@pytest.mark.parametrize("name", TINY)
def test_analytic_equals_counted(zoo_costs: Callable[[str], CostModel], name: str) -> None:
    costs = zoo_costs(name)
    shapes = shapes_of(costs)
    assert costs.census.unknown == ()
    counted = costs.flops(shapes, "counted")
    assert differences(costs.flops(shapes), counted) == {}
    assert all((counted[part][1:] > 0).all() for part in ("vision", "projector", "llm_prefill"))


@pytest.mark.parametrize("name", TINY)
def test_equals_a_whole_forward_on_the_cpu(
    zoo_costs: Callable[[str], CostModel], name: str
) -> None:
    """The real model with real numbers and eager attention, nothing replaced."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForImageTextToText

    costs = zoo_costs(name)
    shapes = list(shapes_of(costs, ((640, 480),)))
    model = AutoModelForImageTextToText.from_config(
        costs.architecture.transformers_config, attn_implementation="eager"
    ).eval()
    decoder = costs.architecture.components.resolve(model).language_model
    decoder.config._experts_implementation = "batched_mm"
    inputs = costs.architecture.dummy_inputs(640, 480, TEXT_TOKENS, device="cpu")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs, logits_to_keep=1, use_cache=True)
    image = shapes[1]
    shape = RequestShape(
        **{**vars(image), "num_total_tokens": inputs["input_ids"].shape[1], "num_output_tokens": 1}
    )
    assert counter.get_total_flops() == costs.flops(shape)["total"]


def test_molmo2_whose_image_processor_needs_torchvision(
    zoo_costs: Callable[[str], CostModel],
) -> None:
    """Two crops pooled to 7 tokens; inputs made by hand."""
    import torch

    costs = zoo_costs("tiny-molmo2")
    vision = costs.architecture.transformers_config.vision_config
    patches, pixels = vision.num_position_embeddings, 3 * vision.patch_size**2
    inputs = {
        "pixel_values": torch.empty(2, patches, pixels, device="meta"),
        "image_token_pooling": torch.arange(28).view(7, 4),
        "image_grids": torch.tensor([[1, 3, 2, 2]]),
    }
    encoder, projector = costs.counter.vision(inputs)
    flops = costs.flops(RequestShape(1, 1, 30, 7, 2, 2 * patches, 5))
    assert (encoder.flops, projector.flops) == (flops["vision"], flops["projector"])
    assert costs.counter.prefill(30).flops == flops["llm_prefill"]
    assert sum(costs.counter.step(30 + t).flops for t in range(4)) == flops["llm_decode"]


@pytest.mark.parametrize("name", [*TINY, "tiny-molmo2"])
def test_census_agrees_with_the_architecture(
    zoo_costs: Callable[[str], CostModel], name: str
) -> None:
    costs = zoo_costs(name)
    census, architecture = costs.census, costs.architecture
    assert census.parameters == architecture.parameters.params_total
    kept = 2 * sum(width for width, _ in census.kv_widths)
    assert kept == architecture.kv_bytes_per_token("bfloat16")
    shape = RequestShape(0, 0, 11, 0, 0, 0, 1)
    window = census.sliding_window
    if window is None or window > 11:
        assert costs.kv_cache_bytes(shape, "bfloat16") == 11 * kept


# ViT, pooling and projector per crop, in GFLOP; decoder prefill without attention at 760 tokens,
# in TFLOP; the least bytes of a decode step in bf16, in GB.
MOLMO = {
    "molmoe-1b": (366.0, 5.74, 1.21, 1.64, 2.36),
    "molmo-7b-o": (366.0, 5.74, 19.5, 9.84, 13.77),
    "molmo-7b-d": (366.0, 5.74, 30.7, 9.92, 14.14),
    "molmo-72b": (366.0, 5.74, 87.2, None, None),
}


@pytest.mark.parametrize("name", MOLMO)
def test_molmo_at_640_by_480(zoo_costs: Callable[[str], CostModel], name: str) -> None:
    vit, pooling, projector, prefill, step = MOLMO[name]
    costs = zoo_costs(name)
    shape = RequestShape(640, 480, 760, 704, 7, 7 * 576, 2)
    flops = costs.flops(shape)
    assert flops["vision"] / 7e9 == pytest.approx(vit, abs=0.05)
    assert flops["vision"] / 1e12 == pytest.approx(2.56, abs=0.005)
    assert flops["projector"] / 7e9 == pytest.approx(pooling + projector, abs=0.06)
    census = costs.census
    width = census.llm.flops["pair"]
    if prefill is not None:
        matmul = flops["llm_prefill"] - width * 760**2
        assert matmul / 1e12 == pytest.approx(prefill, abs=0.01)
        weights = costs.bytes_moved(RequestShape(0, 0, 1, 0, 0, 0, 2), "bfloat16")["llm_decode"]
        assert weights / 1e9 == pytest.approx(step, abs=0.02)
    counted = costs.flops(shape, "counted")
    assert differences(flops, counted) == {}


def test_causal_attention_of_molmo_7b_d(zoo_costs: Callable[[str], CostModel]) -> None:
    costs = zoo_costs("molmo-7b-d")
    shape = RequestShape(640, 480, 760, 704, 7, 7 * 576, 1)
    matmul = costs.flops(shape)["llm_prefill"] - costs.census.llm.flops["pair"] * 760**2
    causal = costs.flops(shape, "analytic_causal")["llm_prefill"] - matmul
    # 4 · layers · hidden · S(S + 1)/2
    assert causal == 4 * 28 * 3584 * 760 * 761 // 2


def test_sliding_layers_keep_their_window(zoo_costs: Callable[[str], CostModel]) -> None:
    costs = zoo_costs("tiny-gemma3")
    window = costs.census.sliding_window
    assert window is not None
    for prompt, outputs in ((window - 3, 8), (window + 20, 6)):
        shape = RequestShape(0, 0, prompt, 0, 0, 0, outputs)
        literal = sum(costs.counter.step(prompt + t).flops for t in range(outputs - 1))
        assert costs.flops(shape)["llm_decode"] == literal
        assert costs.flops(shape, "counted")["llm_decode"] == literal


def test_experts_that_several_tokens_visit(zoo_costs: Callable[[str], CostModel]) -> None:
    assert expected_experts(64, 8, 1) == pytest.approx(8)
    assert expected_experts(64, 8, 1000) == pytest.approx(64)
    costs = zoo_costs("tiny-molmoe")
    census = costs.census
    one = costs.bytes_moved(RequestShape(0, 0, 1, 0, 0, 0, 1), "float32")["llm_prefill"]
    many = costs.bytes_moved(RequestShape(0, 0, 400, 0, 0, 0, 1), "float32")["llm_prefill"]
    idle = 4 * census.llm.expert_weights * (1 - census.top_k / census.num_experts)
    assert many - one > idle * 0.99
    # FLOPs know only the active ones.
    active = costs.architecture.parameters.params_llm_active
    assert costs.flops(RequestShape(0, 0, 400, 0, 0, 0, 1))["llm_prefill"] < 2 * 400 * active * 1.2
