"""Every number worked by hand for a model of two layers."""

import numpy as np
import pandas as pd
import pytest

from vlm_latency.costs import CostModel, RequestShape
from vlm_latency.costs.curves import count_images, decode_flops, prefill_flops
from vlm_latency.costs.units import Windows, cache_sum

# One crop of 2 × 2 patches, 4 vision and 3 text tokens in, 4 tokens out (3 decode steps).
SHAPE = RequestShape(28, 28, 7, 4, 1, 4, 4)

PATCH_EMBEDDING = 4 * 2 * (3 * 14 * 14) * 8
VISION_LAYER = 5 * 2 * (4 * 8 * 8 + 2 * 8 * 12) + 4 * 5**2 * 8  # 4 patches + class token
VISION = PATCH_EMBEDDING + 2 * VISION_LAYER
PROJECTOR = 4 * 2 * (8 * 16 + 16 * 16)
TOKEN = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 20)  # q, k and v, o, gated MLP; one layer
PAIR = 4 * 16  # scores and values, 4 heads of 4
HEAD = 2 * 16 * 50
PREFILL = 2 * (7 * TOKEN + 7**2 * PAIR) + HEAD
DECODE = 2 * (3 * TOKEN + (8 + 9 + 10) * PAIR) + 3 * HEAD


def test_analytic(by_hand: CostModel) -> None:
    assert by_hand.flops(SHAPE) == {
        "vision": VISION,
        "projector": PROJECTOR,
        "llm_prefill": PREFILL,
        "llm_decode": DECODE,
        "total": VISION + PROJECTOR + PREFILL + DECODE,
    }


def test_counted_is_the_same(by_hand: CostModel) -> None:
    assert by_hand.flops(SHAPE, "counted") == by_hand.flops(SHAPE)


def test_causal_counts_the_pairs_below_the_diagonal(by_hand: CostModel) -> None:
    full, causal = by_hand.flops(SHAPE), by_hand.flops(SHAPE, "analytic_causal")
    assert full["llm_prefill"] - causal["llm_prefill"] == 2 * PAIR * (7 * 7 - 7 * 8 // 2)
    for part in ("vision", "projector", "llm_decode"):  # an image sees itself in full
        assert causal[part] == full[part]


def test_rule_is_parameters_times_tokens(by_hand: CostModel) -> None:
    sizes = by_hand.architecture.parameters
    assert by_hand.flops(SHAPE, "rule") == {
        "vision": 2 * sizes.params_vision_encoder * 4,
        "projector": 2 * sizes.params_projector,
        "llm_prefill": 2 * sizes.params_llm * 7,
        "llm_decode": 2 * sizes.params_llm * 4,
        "total": 2
        * (sizes.params_vision_encoder * 4 + sizes.params_projector + sizes.params_llm * 11),
    }


@pytest.mark.parametrize("estimator", ["analytic", "counted", "analytic_causal", "rule"])
def test_text_only_costs_no_vision(by_hand: CostModel, estimator: str) -> None:
    flops = by_hand.flops(RequestShape(0, 0, 5, 0, 0, 0, 2), estimator)
    assert flops["vision"] == flops["projector"] == 0
    assert flops["llm_prefill"] > flops["llm_decode"] > 0


@pytest.mark.parametrize("estimator", ["analytic", "counted", "analytic_causal"])
def test_one_token_costs_no_decode(by_hand: CostModel, estimator: str) -> None:
    assert by_hand.flops(RequestShape(28, 28, 7, 4, 1, 4, 1), estimator)["llm_decode"] == 0


def test_one_token_in_one_token_out(by_hand: CostModel) -> None:
    shape = RequestShape(0, 0, 1, 0, 0, 0, 1)
    assert by_hand.flops(shape)["total"] == 2 * (TOKEN + PAIR) + HEAD
    assert by_hand.flops(shape, "counted") == by_hand.flops(shape)
    assert by_hand.flops(shape, "analytic_causal") == by_hand.flops(shape)


def test_decode_is_the_sum_of_its_steps(by_hand: CostModel) -> None:
    for prompt, outputs in ((1, 2), (7, 40), (300, 65)):
        steps = [by_hand.counter.step(prompt + t).flops for t in range(outputs - 1)]
        shape = RequestShape(0, 0, prompt, 0, 0, 0, outputs)
        assert by_hand.flops(shape)["llm_decode"] == sum(steps)
        assert by_hand.flops(shape, "counted")["llm_decode"] == sum(steps)


@pytest.mark.parametrize("window", [None, 1, 6, 100])
def test_cache_sum_is_the_literal_sum(window: int | None) -> None:
    for start in (0, 1, 5, 6, 7, 50):
        for steps in (0, 1, 3, 60):
            seen = [min(start + t, window or 10**9) for t in range(1, steps + 1)]
            assert cache_sum(start, steps, window) == sum(seen)


def test_window_pairs_are_the_sum_over_windows() -> None:
    windows = Windows(side=4, merge=2)
    for height, width in ((8, 8), (10, 6), (26, 34)):
        sizes: dict[tuple[int, int], int] = {}
        for y in range(height):
            for x in range(width):
                sizes[y // 8, x // 8] = sizes.get((y // 8, x // 8), 0) + 1
        assert windows.pairs(height, width) == sum(size**2 for size in sizes.values())


def test_arrays_give_what_single_requests_give(by_hand: CostModel) -> None:
    table = pd.DataFrame(
        {
            "image_width": [28, pd.NA, 28],
            "image_height": [28, pd.NA, 28],
            "num_total_tokens": [7, 5, 30],
            "num_vision_tokens": [4, 0, 4],
            "num_crops": [1, 0, 1],
            "num_vision_patches": [4, 0, 4],
            "num_output_tokens": [4, 1, 9],
        }
    ).astype("Int64")
    shapes = RequestShape.of_table(table)
    for estimator in ("analytic", "counted", "analytic_causal", "rule"):
        together = by_hand.flops(shapes, estimator)
        for i, shape in enumerate(shapes):
            for part, flops in by_hand.flops(shape, estimator).items():
                assert together[part][i] == flops, (estimator, part, i)


def test_bytes(by_hand: CostModel) -> None:
    moved = by_hand.bytes_moved(SHAPE, "bfloat16")
    norms = 2 * 8  # weight and bias
    vision_layer = 4 * (8 * 8 + 8) + (8 * 12 + 12) + (12 * 8 + 8) + 2 * norms
    vision_weights = 8 * 3 * 14 * 14 + 8 + 5 * 8 + 2 * norms + 2 * vision_layer
    vision_read = (
        4 * (3 * 14 * 14 + 8) + 2 * 5 * (4 * (8 + 8) + 4 * 8 + (8 + 12) * 2)  # in and out
    )
    assert moved["vision"] == 2 * (vision_weights + vision_read)
    assert moved["projector"] == 2 * ((8 * 16 + 16) + (16 * 16 + 16) + 4 * (8 + 16 + 16 + 16))

    layer = TOKEN // 2 + 2 * 16
    weights = 2 * layer + 16 + 16 * 50  # final norm, head; the embedding table is not read whole
    per_token = 2 * ((16 + 16) * 2 + (16 + 8) * 2 + (16 + 20) * 3 + 2 * 16) + 2 * 16
    kv = 2 * 2 * 8  # two layers, keys and values
    assert moved["llm_prefill"] == 2 * (weights + 7 * per_token + (16 + 50) + 7 * kv * 2)
    step = weights + per_token + 16 + 50 + kv
    assert moved["llm_decode"] == 2 * (3 * step + (8 + 9 + 10) * kv)
    assert moved["total"] == sum(moved[part] for part in moved if part != "total")
    assert by_hand.bytes_moved(SHAPE, "float32")["total"] == 2 * moved["total"]


def test_memory(by_hand: CostModel) -> None:
    assert by_hand.kv_cache_bytes(SHAPE, "bfloat16") == (7 + 3) * 2 * 2 * 8 * 2
    weights = 4 * by_hand.architecture.parameters.params_total
    short = by_hand.peak_memory_bytes(SHAPE, "float32")
    long = by_hand.peak_memory_bytes(RequestShape(28, 28, 500, 4, 1, 4, 4), "float32")
    assert weights < short < long


def test_launches_follow_forwards_and_not_lengths(by_hand: CostModel) -> None:
    short, long = by_hand.launches(SHAPE), by_hand.launches(RequestShape(28, 28, 90, 4, 1, 4, 7))
    for part in ("vision", "projector", "llm_prefill"):
        assert short[part] == long[part] > 0
    assert long["llm_decode"] == 2 * short["llm_decode"]  # 6 steps, 3 steps
    # conv, 2 x (7 linears, attention, 2 norms, …): at least one launch for each
    assert short["llm_prefill"] > 2 * (7 + 1 + 2)
    assert int(np.asarray(by_hand.launches(RequestShape(0, 0, 5, 0, 0, 0, 1))["vision"])) == 0


def test_images_that_are_not_counted_follow_from_those_that_are() -> None:
    traits = {(h, w): (1, h * w, (h * w) ** 2, h + w) for h in range(1, 12) for w in range(1, 12)}
    asked = []

    def count(image: tuple[int, int]) -> tuple[int, int]:
        asked.append(image)
        h, w = image
        return 7 + 3 * h * w + 2 * (h * w) ** 2, 5 * (h + w) - 1

    found = count_images(traits, count)
    assert len(asked) < 20
    assert found == {image: count(image) for image in traits}


def test_few_images_are_all_counted() -> None:
    asked = []

    def count(image: int) -> tuple[int]:
        asked.append(image)
        return (image**3,)

    assert count_images({image: (1, image) for image in range(12)}, count)[11] == (11**3,)
    assert asked == list(range(12))


def test_counts_that_do_not_follow_are_counted_one_by_one() -> None:
    found = count_images({image: (1, image) for image in range(100)}, lambda image: (image**2,))
    assert found == {image: (image**2,) for image in range(100)}


def test_a_curve_in_steps_is_counted_at_each_length() -> None:
    chunks = prefill_flops(lambda n: 5 * n + 1000 * -(-n // 64), range(1, 200))
    assert chunks == {n: 5 * n + 1000 * -(-n // 64) for n in range(1, 200)}
    steps = decode_flops(lambda n: 3 * n + n // 10, [(40, 25), (7, 0)])
    assert steps == {(40, 25): sum(3 * n + n // 10 for n in range(40, 65)), (7, 0): 0}
