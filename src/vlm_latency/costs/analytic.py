"""Exact FLOPs by arithmetic: units of a request × FLOPs per unit, nothing is run.

One multiplication and one addition are two FLOPs. Counted are matrix products, convolutions and
attention, as `torch.utils.flop_counter` does; norms, activations, softmax and rotary positions
(below one per cent) are not. Decode attends to a cache that grows with the text; a static cache
(``model.engine=static`` or ``compiled``) is attended to in its full length, which is more.
"""

from __future__ import annotations

from typing import Any

from vlm_latency.costs.shapes import RequestShape
from vlm_latency.costs.units import Census, Tally, causal_pairs, units


def analytic(
    census: Census, shape: RequestShape, *, causal: bool = False, grid_pairs: Any = 0
) -> dict[str, Any]:
    """Count the FLOPs of each part of a request.

    Parameters
    ----------
    census : Census
        Of the model, see `take_census`.
    shape : RequestShape
        One request, or arrays of many.
    causal : bool
        Count only the pairs that the causal mask of prefill leaves. By default all S × S, which
        is what a kernel without block skipping executes and what counters count.
    grid_pairs
        Sum of squared window sizes, for encoders with windowed attention.

    Returns
    -------
    dict
        FLOPs of ``vision``, ``projector``, ``llm_prefill``, ``llm_decode`` and ``total``; ints or
        int64 arrays. N output tokens are N − 1 decode forwards, over a cache that grows from the
        prompt's length.
    """
    counts = units(census, shape, grid_pairs)
    if causal:
        counts["llm_prefill"].update(causal_pairs(census, shape))
    flops = {
        "vision": _total(census.vision, counts["vision"]),
        "projector": _total(census.projector, counts["projector"]),
        **{
            part: _total(census.llm, counts[part]) + _total(census.head, counts[part])
            for part in ("llm_prefill", "llm_decode")
        },
    }
    return {**flops, "total": sum(flops.values())}


def _total(tally: Tally, counts: dict[str, Any]) -> Any:
    return sum(flops * counts[unit] for unit, flops in tally.flops.items())
