"""Bytes that must cross the memory bus, and how much memory a request needs.

Every weight is read once per forward, every activation of a matrix product or attention is read
and written once, keys and values are written once and read by each later step. Caches that hold
a part of this, and element-wise operations that are not fused, make the real traffic differ:
these are the least bytes of an unfused implementation with fused attention.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vlm_latency.costs.shapes import RequestShape
from vlm_latency.costs.units import Census, Tally, cache_sum, units
from vlm_latency.errors import UserError
from vlm_latency.records import BYTES_PER_VALUE


def element_bytes(dtype: str) -> int:
    """Give the bytes of one element.

    Raises
    ------
    UserError
        For a dtype that models are not measured in.
    """
    if dtype not in BYTES_PER_VALUE:
        raise UserError(f"found dtype {dtype!r}; expected one of {', '.join(BYTES_PER_VALUE)}")
    return BYTES_PER_VALUE[dtype]


def expected_experts(num_experts: int, top_k: int, tokens: Any) -> Any:
    """Number of distinct experts that `tokens` tokens visit, if routing were uniform.

    E·(1 − (1 − k/E)^tokens)

    >>> float(expected_experts(64, 8, 1)), float(expected_experts(64, 8, 2))
    (8.0, 15.0)
    """
    return num_experts * (1 - (1 - top_k / num_experts) ** np.asarray(tokens, dtype=float))


def bytes_moved(census: Census, shape: RequestShape, dtype: str) -> dict[str, Any]:
    """Sum the bytes of each part of a request.

    Parameters
    ----------
    census : Census
    shape : RequestShape
        One request, or arrays of many.
    dtype : str
        Of weights, activations and cache.

    Returns
    -------
    dict
        Bytes of ``vision``, ``projector``, ``llm_prefill``, ``llm_decode`` and ``total``.
    """
    size = element_bytes(dtype)
    counts = units(census, shape)
    has_image = np.minimum(shape.num_crops, 1)
    prompt = np.asarray(shape.num_total_tokens, dtype=np.int64)
    steps = np.asarray(shape.decode_steps, dtype=np.int64)
    dense = census.llm.weights + census.head.weights

    elements = {
        "vision": has_image * census.vision.weights + _activations(census.vision, counts["vision"]),
        "projector": has_image * census.projector.weights
        + _activations(census.projector, counts["projector"]),
        "llm_prefill": dense
        + _experts(census, prompt, np.asarray(shape.num_vision_tokens, dtype=np.int64))
        + _cache(census, 0, prompt, as_one=True),
        "llm_decode": steps * (dense + _experts(census, 1, 0)) + _cache(census, prompt, steps),
    }
    for part in ("llm_prefill", "llm_decode"):
        for tally in (census.llm, census.head):
            elements[part] = elements[part] + _activations(tally, counts[part])
        # One embedding row per token, read and written.
        elements[part] = elements[part] + counts[part]["token"] * 2 * census.hidden_size
    moved = {part: np.asarray(value * size, dtype=np.int64) for part, value in elements.items()}
    return {**moved, "total": sum(moved.values())}


def kv_cache_bytes(census: Census, shape: RequestShape, dtype: str) -> Any:
    """Give the cache's size after the last forward: prompt + N − 1 tokens, as in transformers.

    A sliding layer keeps its window less the token that comes next.
    """
    length = np.asarray(shape.num_total_tokens + shape.decode_steps, dtype=np.int64)
    elements = sum(
        width * (np.minimum(length, window - 1) if window else length)
        for width, window in census.kv_widths
    )
    return elements * element_bytes(dtype)


def peak_memory_bytes(census: Census, shape: RequestShape, dtype: str) -> Any:
    """Predict the peak: weights, and the larger of the vision encoder's and the decoder's needs.

    The encoder needs its widest layer over all positions; the decoder its cache, the widest layer
    over the prompt, and one row of float32 logits. Allocator rounding and work spaces are not in.
    """
    size = element_bytes(dtype)
    counts = units(census, shape)
    vision = counts["vision"]["position"] * census.vision.widest * size
    decoder = counts["llm_prefill"]["token"] * census.llm.widest * size + 4 * census.vocab_rows
    return census.parameters * size + np.maximum(
        vision, decoder + kv_cache_bytes(census, shape, dtype)
    )


def _activations(tally: Tally, counts: dict[str, Any]) -> Any:
    return sum(elements * counts[unit] for unit, elements in tally.elements.items())


def _experts(census: Census, tokens: Any, of_image: Any) -> Any:
    """Weights of the experts that so many tokens visit, `of_image` of them an image's."""
    if not census.num_experts:
        return 0
    tally = census.llm
    if not tally.vision_expert_weights:
        of_image = np.zeros_like(tokens)
    return sum(
        weights * expected_experts(census.num_experts, census.top_k, visits) / census.num_experts
        for weights, visits in (
            (tally.expert_weights, tokens - of_image),
            (tally.vision_expert_weights, of_image),
        )
    )


def _cache(census: Census, start: Any, steps: Any, *, as_one: bool = False) -> Any:
    """Elements of keys and values written, and read: at each step, or once by a fused prefill."""
    return sum(
        width * (steps + (steps if as_one else cache_sum(start, steps, window)))
        for width, window in census.kv_widths
    )
