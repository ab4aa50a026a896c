"""Data whose truth is known: latencies, sweeps, requests, shapes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import scipy

Generator = np.random.Generator
Floats = np.ndarray


def lognormal_of(
    sigma: float,
) -> tuple[Callable[[Generator, int], Floats], Callable[[float], float]]:
    def quantile(p: float) -> float:
        return float(np.exp(3 + sigma * scipy.stats.norm.ppf(p)))

    return lambda rng, n: np.exp(rng.normal(3, sigma, n)), quantile


def crops(rng: Generator, n: int) -> Floats:
    return 20 + 30 * rng.choice([2.0, 5.0, 7.0, 13.0], p=[0.55, 0.3, 0.1, 0.05], size=n)


def mixture_of_tokens(rng: Generator, n: int) -> Floats:
    return crops(rng, n) * np.exp(rng.normal(0, 0.03, n))


DATA: dict[str, tuple[Callable[[Generator, int], Floats], float]] = {
    "normal": (lambda rng, n: rng.normal(100, 5, n), 100.0),
    "lognormal 0.3": (lognormal_of(0.3)[0], math.exp(3 + 0.3**2 / 2)),
    "lognormal 0.5": (lognormal_of(0.5)[0], math.exp(3 + 0.5**2 / 2)),
    "mixture of token counts": (mixture_of_tokens, (20 + 30 * 3.95) * math.exp(0.03**2 / 2)),
    "heavy tail (Pareto 2.5)": (
        lambda rng, n: 50 * (1 + 0.2 * rng.pareto(2.5, n)),
        50 * (1 + 0.2 / 1.5),
    ),
    "ties (a clock of 2 ms)": (lambda rng, n: 2 * np.round(rng.normal(100, 5, n) / 2), 100.0),
}
HARD = ("mixture of token counts", "heavy tail (Pareto 2.5)")


def clustered(
    rng: Generator, images: int, per_image: int, share: float = 0.8, sigma: float = 0.3
) -> tuple[Floats, np.ndarray]:
    """Lognormal values of which the image makes `share` of the variance (of the logarithm)."""
    image = np.repeat(np.arange(images), per_image)
    between = rng.normal(0, math.sqrt(share) * sigma, images)[image]
    return np.exp(3 + between + rng.normal(0, math.sqrt(1 - share) * sigma, image.size)), image


# The defaults: exp3 makes 5 runs of each of 15 requests, exp4 one of each of 5 images and lengths.
TOKENS = np.array(
    [288, 384, 480, 576, 672, 768, 864, 960, 1056, 1152, 1248, 1344, 704, 1152, 1184.0]
)
CROPS = np.array([3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 7, 13, 13.0])


def sweep(
    rng: Generator,
    latency: Floats,
    *,
    effect: float = 0.01,
    noise: float = 0.02,
    spikes: float = 0.0,
    copies: int = 1,
) -> tuple[Floats, Floats, np.ndarray]:
    """Runs of a vision sweep: what each request does to all of its runs, noise, and slow runs."""
    tokens, latency = np.tile(TOKENS, copies), np.tile(latency, copies)
    request = np.repeat(np.arange(tokens.size), 5)
    y = latency[request] * np.exp(
        rng.normal(0, effect, tokens.size)[request] + rng.normal(0, noise, request.size)
    )
    y += np.where(rng.random(y.size) < spikes, rng.exponential(150, y.size), 0)
    return tokens[request], y, request


LENGTHS = (8, 16, 32, 64, 128)


def decodes(
    rng: Generator, images: int, *, spikes: float = 0.0
) -> tuple[Floats, Floats, np.ndarray]:
    """Runs of a language sweep, 2 ms per token: tokens, decode time, image; and slow runs."""
    tokens = np.tile(np.array(LENGTHS, float), images)
    image = np.repeat(np.arange(images), len(LENGTHS))
    effect = rng.normal(0, 0.01, images)[image]
    ms = 2 * (tokens - 1) * np.exp(effect + rng.normal(0, 0.02, image.size))
    slow = np.where(rng.random(ms.size) < spikes, rng.exponential(150, ms.size), 0)
    return tokens, ms + slow, image


def steps(
    rng: Generator,
    images: int,
    growth: float,
    noise: float = 0.03,
    lengths: tuple[int, ...] = LENGTHS,
) -> tuple[Floats, Floats, np.ndarray]:
    """Decode steps of every run of a language sweep: position, ms, image."""
    position, ms, image = [], [], []
    for i in range(images):
        for length in lengths:
            at = np.arange(1, length)
            run = math.exp(rng.normal(0, 0.01))
            step = 2 * run * (1 + (growth - 1) * (at - 1) / (max(lengths) - 2))
            position.append(at)
            ms.append(step * np.exp(rng.normal(0, noise, at.size)))
            image.append(np.full(at.size, i))
    return np.concatenate(position).astype(float), np.concatenate(ms), np.concatenate(image)


def requests_of_exp1(rng: Generator, n: int, repeats: int, noise: float) -> pd.DataFrame:
    """Runs of exp1: crops and output tokens drawn, some requests twice."""
    crops, tokens = rng.choice([2, 5, 7, 13], n), rng.integers(1, 9, n)
    request = np.concatenate([np.arange(n), rng.permutation(n)[:repeats]])
    total = 200 + 30 * crops[request] + 30 * tokens[request] + rng.normal(0, noise, request.size)
    return pd.DataFrame(
        {
            "request_id": request,
            "image_id": request,
            "num_crops": crops[request],
            "num_output_tokens": tokens[request],
            "num_language_tokens": rng.poisson(12, n)[request],
            "T_total": total,
        }
    )


def shapes_with_costs(rng: Generator, shapes: int) -> tuple[Floats, Floats, Floats, list[Floats]]:
    """Shapes with their FLOPs, costs, mean latency over 5 runs, and the runs."""
    tokens = rng.uniform(288, 1344, shapes)
    outputs = np.exp(rng.uniform(0, math.log(256), shapes))
    typical = (5 + 0.14 * tokens + 2 * outputs) * np.exp(rng.normal(0, 0.03, shapes))
    runs = typical[:, None] * np.exp(rng.normal(0, 0.03, (shapes, 5)))
    flops = np.column_stack([np.ones(shapes), 4 * tokens + 3 * outputs])
    return flops, np.column_stack([np.ones(shapes), tokens, outputs]), runs.mean(axis=1), list(runs)
