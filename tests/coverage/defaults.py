"""Headline numbers of the reports, on data of the size and kind that a default run makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import scipy
from simulated import Floats, Generator, clustered, decodes, lognormal_of
from table import Cell

from vlm_latency import statistics as st
from vlm_latency.statistics import Estimate

# exp1: one run of 80 images, a second one of 16; exp4: 5 images at 5 lengths.
EXP1, EXP2, EXP4 = "80 + 16", "40", "5 × 5"


def defaults() -> Iterator[Cell]:
    """Give the cells of exp1, exp2 and exp4; exp3 (15 × 5) and exp5 (20 shapes) are among others."""
    mean = math.exp(3 + 0.3**2 / 2)
    yield Cell(
        "mean, over images", "clustered", EXP1, mean,
        lambda rng: st.mean_estimate(*_twice(rng)), 2_000,
    )  # fmt: skip
    for q in (50, 95, 99):
        yield Cell(
            f"P{q}, over images", "clustered", EXP1, lognormal_of(0.3)[1](q / 100),
            lambda rng, q=q: _percentile(rng, q), 1_000, exact=False,
        )  # fmt: skip
    yield Cell(
        "P99 / P50", "clustered, over images", EXP1, math.exp(0.3 * scipy.stats.norm.ppf(0.99)),
        _tail, 1_000, exact=False,
    )  # fmt: skip
    yield Cell(
        "mean", "lognormal 0.3", EXP2, mean,
        lambda rng: st.mean_estimate(np.exp(rng.normal(3, 0.3, 40))), 2_000,
    )  # fmt: skip
    yield Cell(
        "mean, over images", "clustered", EXP4, mean,
        lambda rng: st.mean_estimate(*clustered(rng, 5, 5)), 2_000,
    )  # fmt: skip
    fits: dict[str, Callable[..., st.LinearFit]] = {
        "least squares": st.linear_fit,
        "robust": st.robust_line,
        "headline of the two": lambda *data: st.headline_line(*data).headline,
    }
    for name, fit in fits.items():
        yield Cell(
            f"slope, {name}", "clustered, output tokens", EXP4, 2.0,
            lambda rng, fit=fit: fit(*decodes(rng, 5)).slope,
        )  # fmt: skip
        if fit is not st.linear_fit:
            yield Cell(
                f"slope, {name}", "clustered, output tokens, 5 % of runs far too slow", EXP4, 2.0,
                lambda rng, fit=fit: fit(*decodes(rng, 5, spikes=0.05)).slope, exact=False,
            )  # fmt: skip
    yield Cell(
        "exponent of a power law", "clustered, output tokens", EXP4, 1.0, _exponent,
    )  # fmt: skip


def _twice(rng: Generator) -> tuple[Floats, np.ndarray]:
    values, image = clustered(rng, 80, 2)
    kept = (np.arange(160) % 2 == 0) | (image < 16)
    return values[kept], image[kept]


def _percentile(rng: Generator, q: float) -> Estimate:
    values, image = _twice(rng)
    return st.percentile(values, q, clusters=image)


def _tail(rng: Generator) -> Estimate:
    values, image = _twice(rng)
    return st.tail_ratio(values, clusters=image)


def _exponent(rng: Generator) -> Estimate:
    tokens, ms, image = decodes(rng, 5)
    return st.power_law_fit(tokens - 1, ms, image).exponent
