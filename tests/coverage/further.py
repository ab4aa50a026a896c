"""Intercepts, scales, transfer between regimes, and tables of runs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import pandas as pd
from simulated import (
    CROPS,
    TOKENS,
    Floats,
    Generator,
    clustered,
    shapes_with_costs,
    sweep,
)
from table import SEED, Cell

from vlm_latency import statistics as st
from vlm_latency.statistics import Estimate

OTHER_REGIME = 1.3  # a shape of the other regime takes so many times as long


def further() -> Iterator[Cell]:
    """Give the cells of what stands beside a headline number."""
    line = 10 + 0.14 * TOKENS
    for name, fit in (("least squares", st.linear_fit), ("robust", st.robust_line)):
        yield Cell(
            f"intercept, {name}", "clustered", "15 × 5", 10.0,
            lambda rng, fit=fit: fit(*sweep(rng, line)).intercept, 600, exact=fit is not st.linear_fit,
        )  # fmt: skip
    yield Cell(
        "intercept beside two slopes", "clustered", "15 × 5", 10.0, _intercept_of_two, 600,
        exact=False,
    )  # fmt: skip
    yield Cell(
        "scale of a power law", "clustered", "15 × 5", 0.2,
        lambda rng: st.power_law_fit(*sweep(rng, 0.2 * TOKENS**0.9)).scale, 600,
    )  # fmt: skip
    for shapes in (20, 80):
        yield Cell(
            "transfer error of one fit", "lognormal 0.03", f"{shapes} shapes", np.nan,
            lambda rng, shapes=shapes: _transferred(rng, shapes), 400,
        )  # fmt: skip
    yield Cell(
        "ratio of matched requests, over images", "clustered", "20 × 5", 1.05,
        lambda rng: _tables(rng).components["T_total"].ratio, 400,
    )  # fmt: skip


def _intercept_of_two(rng: Generator) -> Estimate:
    x, y, request = sweep(rng, 10 + 4 * CROPS + 0.05 * TOKENS)
    columns = np.column_stack([CROPS[request], x])
    found = st.multi_linear_fit(columns, y, ["crops", "tokens"], request).intercept
    assert found is not None
    return found


@cache
def _many_shapes() -> tuple[Floats, Floats]:
    _, X, y, _ = shapes_with_costs(np.random.default_rng(SEED), 4_000)
    return X, OTHER_REGIME * y


def _transferred(rng: Generator, shapes: int) -> float:
    """Whether the interval holds what this very fit errs by on very many shapes."""
    _, X, y, _ = shapes_with_costs(rng, 27)
    _, others, latency, _ = shapes_with_costs(rng, shapes)
    many, theirs = _many_shapes()
    truth = float(np.abs(st.nnls_relative_fit(X, y).predict(many) / theirs - 1).mean())
    found = st.transfer_error(st.nnls_relative_fit, (X, y), (others, OTHER_REGIME * latency))
    assert found.low is not None and found.high is not None
    return float(found.low <= truth <= found.high)


def _tables(rng: Generator) -> st.TableComparison:
    before, image = clustered(rng, 20, 5)
    effect = rng.normal(np.log(1.05), 0.05, 20)[image]
    after = before * np.exp(effect + rng.normal(0, 0.05, image.size))
    tables = [
        pd.DataFrame({"request_id": np.arange(100), "image_id": image, "T_total": times})
        for times in (before, after)
    ]
    return st.compare_tables(*tables)
