"""Verdicts of the claims on data built to satisfy or violate them by a stated effect."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable

import numpy as np
from cells import step_growth, validated
from simulated import TOKENS, Floats, Generator, shapes_with_costs, sweep
from table import SEED, Verdicts

from vlm_latency import statistics as st


def claims() -> dict[str, tuple[str, str, Callable[[Generator], st.Claim]]]:
    """Give data that satisfy or violate each claim by a stated effect, at the default n."""

    def vision(latency: Floats, copies: int = 1) -> Callable[[Generator], st.Claim]:
        def judge(rng: Generator) -> st.Claim:
            data = sweep(rng, latency, copies=copies)
            exponent = st.power_law_fit(*data).exponent
            return st.vision_sublinear_claim(st.marginal_change(*data), exponent)

        return judge

    def prefill(latency: Floats) -> Callable[[Generator], st.Claim]:
        def judge(rng: Generator) -> st.Claim:
            line = st.linear_fit(*sweep(rng, latency))
            return st.prefill_grows_claim(line.growth(288, 1344), line.slope)

        return judge

    def tail(sigma: float, n: int) -> Callable[[Generator], st.Claim]:
        return lambda rng: st.tail_claim(st.tail_ratio(np.exp(rng.normal(3, sigma, n))))

    def share(truth: float) -> Callable[[Generator], st.Claim]:
        def judge(rng: Generator) -> st.Claim:
            whole = np.exp(rng.normal(3, 0.3, 40))
            part = truth * whole * np.exp(rng.normal(0, 0.1, 40))
            return st.llm_bottleneck_claim(0.9, st.ratio_estimate(part, whole))

        return judge

    def language(growth: float) -> Callable[[Generator], st.Claim]:
        return lambda rng: st.language_linear_claim(step_growth(rng, 5, growth))

    def flops(rng: Generator) -> st.Claim:
        found = validated(27, int(rng.integers(10_000)))
        return st.flops_imperfect_claim(found.mape["flops"], found.error_ratio("flops", "costs"))

    def perfect(rng: Generator) -> st.Claim:
        flops, costs, _, _ = shapes_with_costs(rng, 27)
        y = flops @ [5, 0.04] * np.exp(rng.normal(0, 0.02, 27))
        looked_at = {"flops": (flops, st.nnls_relative_fit), "costs": (costs, st.nnls_relative_fit)}
        found = st.cross_validate(np.arange(27), looked_at, y)
        return st.flops_imperfect_claim(found.mape["flops"], found.error_ratio("flops", "costs"))

    yes, no = "supported", "contradicted"
    # One more token costs 0.187 ms at the start of the sweep and half of that at its end.
    falling = 0.187 * (TOKENS - 288) - 0.0935 / 1056 / 2 * (TOKENS - 288) ** 2
    return {
        "vision_sublinear: cost per token falls by half": (
            yes, "15 × 5", vision(50 + falling)),
        "vision_sublinear: 50 + 0.1 x + 2e-5 x²": (
            no, "15 × 5", vision(50 + 0.1 * TOKENS + 2e-5 * TOKENS**2)),
        "vision_sublinear: floor of 18 ms, then a line": (
            no, "15 × 5", vision(np.maximum(18, 18 + 0.02 * (TOKENS - 650)))),
        "vision_sublinear: a straight line": (no, "15 × 5", vision(10 + 0.14 * TOKENS)),
        "vision_sublinear: a straight line, more requests": (
            no, "120 × 5", vision(10 + 0.14 * TOKENS, 8)),
        "vision_sublinear: cost per token falls by a tenth, more requests": (
            no, "120 × 5", vision(50 + 0.15 * TOKENS - 7.5e-6 * (TOKENS - 288) ** 2, 8)),
        "prefill_grows: by half": (yes, "15 × 5", prefill(18 + 18 * TOKENS / 2400)),
        "prefill_grows: not at all": (no, "15 × 5", prefill(np.full(TOKENS.size, 18.0))),
        "language_linear: steps alike": (yes, "5 images", language(1.0)),
        "language_linear: last step 1.3 × the first": (no, "5 images", language(1.3)),
        "llm_bottleneck: 60 % of T_total": (yes, "40", share(0.6)),
        "llm_bottleneck: 40 % of T_total": (no, "40", share(0.4)),
        "tail: P99 / P50 = 3.2": (yes, "80", tail(0.5, 80)),
        "tail: P99 / P50 = 1.1": (no, "80", tail(0.04, 80)),
        "tail: P99 / P50 = 1.1, n = 500": (no, "500", tail(0.04, 500)),
        "flops_imperfect: a token costs 0.14 ms in one regime, 2 ms in the other": (
            yes, "27 shapes", flops),
        "flops_imperfect: FLOPs within 2 %": (no, "27 shapes", perfect),
    }  # fmt: skip


def count_verdicts(name: str, scale: float = 1.0) -> Verdicts:
    """Count the verdicts of a claim on its made-up data."""
    right, n, draw = claims()[name]
    rng = np.random.default_rng([SEED, zlib.crc32(name.encode())])
    runs = max(20, round(200 * scale))
    found = Counter[str](draw(rng).verdict for _ in range(runs))
    opposite = runs - found[right] - found["undecided"]
    return Verdicts(name, n, right, found[right] / runs, opposite / runs, found["undecided"] / runs)
