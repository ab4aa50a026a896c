import json

import numpy as np
import pytest

from vlm_latency.statistics import (
    Estimate,
    flops_become_time_claim,
    flops_imperfect_claim,
    language_linear_claim,
    linear_fit,
    llm_bottleneck_claim,
    marginal_change,
    power_law_fit,
    prefill_grows_claim,
    tail_claim,
    tail_ratio,
    vision_sublinear_claim,
)


def about(low: float | None, high: float | None) -> Estimate:
    return Estimate(low, low, high, 0.95, 50, "t")


@pytest.mark.parametrize(
    ("claim", "verdict"),
    [
        (tail_claim(about(1.6, None)), "supported"),
        (tail_claim(about(1.4, 1.6)), "undecided"),
        (tail_claim(about(1.1, 1.4)), "contradicted"),
        (tail_claim(about(1.1, None)), "undecided"),
        (llm_bottleneck_claim(0.9, about(0.6, 0.7)), "supported"),
        (llm_bottleneck_claim(0.9, about(0.4, 0.6)), "undecided"),
        (llm_bottleneck_claim(0.4, about(0.6, 0.7)), "contradicted"),
        (llm_bottleneck_claim(0.9, about(0.1, 0.2)), "contradicted"),
        (llm_bottleneck_claim(None, about(0.6, 0.7)), "undecided"),
        (vision_sublinear_claim(about(-0.7, -0.3)), "supported"),
        (vision_sublinear_claim(about(-0.4, 0.1)), "undecided"),
        (vision_sublinear_claim(about(-0.05, 0.05), about(0.8, 0.9)), "contradicted"),
        (vision_sublinear_claim(about(1.5, 2.0)), "contradicted"),
        (vision_sublinear_claim(None, about(0.7, 0.8)), "undecided"),
        (prefill_grows_claim(about(1.2, 1.4)), "supported"),
        (prefill_grows_claim(about(0.9, 1.2)), "undecided"),
        (prefill_grows_claim(about(1.0, 1.0)), "contradicted"),
        (language_linear_claim(about(0.95, 1.05)), "supported"),
        (language_linear_claim(about(1.05, 1.15)), "undecided"),
        (language_linear_claim(about(1.2, 1.3)), "contradicted"),
        (language_linear_claim(about(0.95, 1.05), about(0.8, 0.9)), "supported"),
        (flops_imperfect_claim(about(0.2, 0.3), about(2.0, 3.0)), "supported"),
        (flops_imperfect_claim(about(0.01, 0.04), about(2.0, 3.0)), "contradicted"),
        (flops_imperfect_claim(about(0.2, 0.3), about(0.5, 0.9)), "contradicted"),
        (flops_imperfect_claim(about(0.2, 0.3), about(0.9, 1.1)), "undecided"),
        (flops_become_time_claim({"a": about(0.92, 1.1), "b": about(0.95, 1.2)}), "supported"),
        (flops_become_time_claim({"a": about(0.92, 1.1), "b": about(0.5, 0.8)}), "contradicted"),
        (flops_become_time_claim({"a": about(0.92, 1.1), "b": about(0.5, 1.2)}), "undecided"),
        (flops_become_time_claim({}), "undecided"),
    ],
)
def test_verdicts(claim: object, verdict: str) -> None:
    assert claim.verdict == verdict
    json.dumps(claim.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    "claim",
    [
        tail_claim(None),
        llm_bottleneck_claim(None, None),
        vision_sublinear_claim(None),
        prefill_grows_claim(None),
        language_linear_claim(None),
        flops_imperfect_claim(None, None),
    ],
)
def test_what_was_not_measured_is_undecided(claim: object) -> None:
    assert claim.verdict == "undecided"
    assert claim.rule


@pytest.mark.parametrize("n", [2, 10, 1000])
def test_constant_latencies_contradict_the_tail_and_the_growth(n: int) -> None:
    constant = np.full(n, 123.4)
    assert str(tail_claim(tail_ratio(constant))) == "tail: contradicted"
    if n > 2:
        growth = linear_fit(np.arange(n), constant).growth(0, n - 1)
        assert prefill_grows_claim(growth).verdict == "contradicted"


TOKENS = np.arange(144.0, 2000, 144)


@pytest.mark.parametrize(
    ("latency", "verdict"),
    [
        (0.3 * TOKENS, "contradicted"),
        (50 + 0.1 * TOKENS + 2e-5 * TOKENS**2, "contradicted"),  # an exponent below 1 all the same
        (np.maximum(20, 0.03 * TOKENS), "contradicted"),
        (TOKENS**0.7, "supported"),
        (50 + TOKENS**0.7, "supported"),
    ],
)
def test_an_offset_makes_nothing_sub_linear(latency: np.ndarray, verdict: str) -> None:
    exponent = power_law_fit(TOKENS, latency).exponent
    claim = vision_sublinear_claim(marginal_change(TOKENS, latency), exponent)
    assert claim.verdict == verdict
    assert bool(claim.note) == (verdict == "contradicted" and exponent.below(1))
