"""FLOPs of shortened sequences, and the conventions of papers."""

from collections.abc import Callable

import numpy as np
import pytest

from vlm_latency.costs import CostModel, RequestShape
from vlm_latency.costs.conventions import (
    CONVENTIONS,
    count,
    lengths_by_layer,
    shortened_decode,
    shortened_prefill,
    table,
)
from vlm_latency.errors import UserError

# Of one layer of the model by hand, and of its head.
TOKEN, PAIR, HEAD = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 20), 4 * 16, 2 * 16 * 50
LLAVA = RequestShape(336, 336, 622, 576, 1, 576, 1)


def test_llava_at_622_positions(zoo_costs: Callable[[str], CostModel]) -> None:
    costs = zoo_costs("llava-1.5-7b")
    d, m, layers, vocab, n = 4096, 11008, 32, 32064, 622
    assert count(costs, LLAVA, "fastv") == layers * (4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m)
    assert count(costs, LLAVA, "fastv") / 1e12 == pytest.approx(3.23, abs=0.005)
    runs = layers * (2 * (4 * d**2 + 3 * d * m) * n + 4 * n**2 * d) + 2 * d * vocab
    assert count(costs, LLAVA, "prefill") == runs == costs.flops(LLAVA)["llm_prefill"]
    assert runs / 1e12 == pytest.approx(8.26, abs=0.005)
    assert count(costs, LLAVA, "full_head") / 1e12 == pytest.approx(8.42, abs=0.005)
    assert count(costs, LLAVA, "request") - runs == sum(
        costs.flops(LLAVA)[part] for part in ("vision", "projector")
    )
    shown = table(costs, LLAVA).set_index("convention")
    assert list(shown.index) == list(CONVENTIONS)
    np.testing.assert_allclose(shown["value"] * shown["ratio"], runs)


def test_fastv_halves_after_layer_two(zoo_costs: Callable[[str], CostModel]) -> None:
    costs = zoo_costs("llava-1.5-7b")
    lengths = lengths_by_layer(622, 334, 2, 32)
    d, m = 4096, 11008
    layer = [4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m for n in (622, 334)]
    assert count(costs, LLAVA, "fastv", lengths) == 2 * layer[0] + 30 * layer[1]


def test_two_layers_by_hand(by_hand: CostModel) -> None:
    census = by_hand.census
    assert shortened_prefill(census, [7, 3]) == 10 * TOKEN + (49 + 9) * PAIR + HEAD
    steps = 2 * (2 * TOKEN + HEAD) + ((8 + 9) + (4 + 5)) * PAIR
    assert shortened_decode(census, [7, 3], 2) == steps


@pytest.mark.parametrize("name", ["tiny-molmoe", "tiny-gemma3", "tiny-qwen2.5-vl"])
def test_one_length_is_the_prefill(zoo_costs: Callable[[str], CostModel], name: str) -> None:
    costs = zoo_costs(name)
    shape = RequestShape(0, 0, 700, 0, 0, 0, 9)
    lengths = [700] * len(costs.census.layers)
    flops = costs.flops(shape)
    assert shortened_prefill(costs.census, lengths) == flops["llm_prefill"]
    assert shortened_decode(costs.census, lengths, 8) == flops["llm_decode"]


def test_what_a_user_gets_wrong(by_hand: CostModel) -> None:
    with pytest.raises(UserError, match="found 3 lengths; expected one for each of 2"):
        shortened_prefill(by_hand.census, [7, 7, 7])
    with pytest.raises(UserError, match="expected one of fastv"):
        count(by_hand, LLAVA, "mine")
    with pytest.raises(UserError, match="positions and layer"):
        lengths_by_layer(10, 11, 2, 4)
