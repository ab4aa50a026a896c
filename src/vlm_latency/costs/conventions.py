"""FLOPs under token reduction: as executed, and by the conventions of papers.

A decoder whose sequence is shortened at layer K runs its first K layers on all tokens and the
others on those kept: a prompt has one length per layer (`shortened_prefill`, `shortened_decode`).
Papers count the same prefill in other ways; `CONVENTIONS` names them and `table` turns one into
another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from vlm_latency.costs.model import CostModel
from vlm_latency.costs.shapes import RequestShape
from vlm_latency.costs.units import Census, cache_sum
from vlm_latency.errors import UserError


def lengths_by_layer(full: int, kept: int, at_layer: int, layers: int) -> list[int]:
    """List the positions that each layer sees when a sequence is shortened before `at_layer`.

    Layers are numbered from 0: with ``at_layer`` 2 the layers 0 and 1 see all.

    >>> lengths_by_layer(622, 110, 2, 4)
    [622, 622, 110, 110]
    """
    if not 0 <= at_layer <= layers or not 0 < kept <= full:
        raise UserError(
            f"found {kept} of {full} positions kept at layer {at_layer} of {layers}; expected "
            f"1 … {full} positions and layer 0 … {layers}"
        )
    return [full] * at_layer + [kept] * (layers - at_layer)


def shortened_prefill(census: Census, lengths: Sequence[int]) -> int:
    """Count the FLOPs of a prefill with these numbers of positions at each layer, as executed.

    Full-square attention within a layer, the head on the last position. With one length for all
    layers it is ``flops_llm_prefill``.

    Parameters
    ----------
    census : Census
        Of a model that is understood.
    lengths : sequence of int
        One per decoder layer, in order.
    """
    seen = _checked(census, lengths)
    work = _outside(census)["token"] * seen[0] + census.head.flops["head"]
    for layer, n in zip(census.layers, seen, strict=True):
        pairs = layer.get("pair", 0) + layer.get("sliding_pair", 0)
        work += layer.get("token", 0) * n + pairs * n**2
    return int(work)


def shortened_decode(census: Census, lengths: Sequence[int], steps: int) -> int:
    """Count the FLOPs of a number of decode forwards over the cache that such a prefill leaves."""
    seen = _checked(census, lengths)
    work = (_outside(census)["token"] + census.head.flops["head"]) * steps
    for layer, n in zip(census.layers, seen, strict=True):
        work += layer.get("token", 0) * steps
        work += layer.get("pair", 0) * int(cache_sum(n, steps))
        if "sliding_pair" in layer:
            work += layer["sliding_pair"] * int(cache_sum(n, steps, census.sliding_window))
    return int(work)


@dataclass(frozen=True)
class Convention:
    """One way to count the FLOPs of a prefill.

    Attributes
    ----------
    name, source
    unit : "MAC" or "FLOP"
        A multiplication with its addition is one MAC, or two FLOPs.
    mlp_matrices : 2, 3 or None
        That the formula gives the MLP; None: those that the model has, and its true widths of
        keys and values.
    head : "none", "last" or "all"
        Positions of which logits are counted.
    encoder : bool
        Whether vision encoder and projector are counted.
    """

    name: str
    source: str
    unit: Literal["MAC", "FLOP"]
    mlp_matrices: Literal[2, 3] | None
    head: Literal["none", "last", "all"]
    encoder: bool


CONVENTIONS = {
    convention.name: convention
    for convention in (
        Convention(
            "fastv",
            "4nd² + 2n²d + 2ndm per layer: FastV, arXiv 2403.06764",
            "MAC",
            2,
            "none",
            False,
        ),
        Convention(
            "fastv_gated",
            "4nd² + 2n²d + 3ndm per layer: FastV's formula with the three matrices of a gated MLP",
            "MAC",
            3,
            "none",
            False,
        ),
        Convention(
            "layers", "decoder layers as they run, without head", "FLOP", None, "none", False
        ),
        Convention("prefill", "as it runs: flops_llm_prefill", "FLOP", None, "last", False),
        Convention(
            "full_head",
            "decoder with logits of all positions, as a forward without logits_to_keep",
            "FLOP",
            None,
            "all",
            False,
        ),
        Convention(
            "request",
            "encoder, projector and prefill as they run",
            "FLOP",
            None,
            "last",
            True,
        ),
    )
}


def count(
    costs: CostModel,
    shape: RequestShape,
    convention: Convention | str,
    lengths: Sequence[int] | None = None,
) -> int:
    """Count the prefill of one request by a convention, in its unit.

    Parameters
    ----------
    costs : CostModel
    shape : RequestShape
        One request; its image is used where the encoder is counted.
    convention : Convention or its name
    lengths : sequence of int, optional
        Positions at each decoder layer; default: all of the prompt's.
    """
    if isinstance(convention, str):
        if convention not in CONVENTIONS:
            raise UserError(
                f"found FLOP convention {convention!r}; expected one of {', '.join(CONVENTIONS)}"
            )
        convention = CONVENTIONS[convention]
    census = costs.census
    if lengths is None:
        lengths = [int(shape.num_total_tokens)] * len(census.layers)
    if convention.mlp_matrices is not None:
        d, m = _widths(costs.architecture)
        return sum(
            4 * n * d**2 + 2 * n**2 * d + convention.mlp_matrices * n * d * m
            for n in map(int, lengths)
        )
    head = census.head.flops["head"]
    positions = {"none": 0, "last": 1, "all": int(lengths[-1])}[convention.head]
    work = shortened_prefill(census, lengths) + head * (positions - 1)
    if convention.encoder:
        flops = costs.flops(shape)
        work += int(flops["vision"]) + int(flops["projector"])
    return work


def table(
    costs: CostModel, shape: RequestShape, lengths: Sequence[int] | None = None
) -> pd.DataFrame:
    """Count the same prefill by every convention; times ``ratio`` it is what is executed.

    Returns
    -------
    DataFrame
        One row per convention: ``convention``, ``unit``, ``value``, ``ratio`` (``prefill`` over
        value), ``source``.
    """
    values = {name: count(costs, shape, name, lengths) for name in CONVENTIONS}
    return pd.DataFrame(
        [
            {
                "convention": name,
                "unit": convention.unit,
                "value": values[name],
                "ratio": values["prefill"] / values[name],
                "source": convention.source,
            }
            for name, convention in CONVENTIONS.items()
        ]
    )


def _checked(census: Census, lengths: Sequence[int]) -> list[int]:
    if "llm" in census.unknown_by_part or "vision_token" in census.llm.flops:
        raise UserError(
            "the FLOPs of a shortened sequence are not known for this decoder: "
            + (", ".join(census.llm.unknown) or "its tokens of text and image visit other experts")
        )
    if len(lengths) != len(census.layers) or len(census.kv_widths) != len(census.layers):
        raise UserError(
            f"found {len(lengths)} lengths; expected one for each of "
            f"{len(census.layers)} decoder layers"
        )
    return [int(length) for length in lengths]


def _outside(census: Census) -> dict[str, int]:
    """FLOPs per token outside of the layers."""
    inside = sum(layer.get("token", 0) for layer in census.layers)
    return {"token": census.llm.flops["token"] - inside}


def _widths(architecture: Any) -> tuple[int, int]:
    """Hidden size and intermediate size, by their names in the configuration."""
    text = architecture.transformers_config.get_text_config()
    found = getattr(text, "hidden_size", None), getattr(text, "intermediate_size", None)
    if not all(isinstance(width, int) for width in found):
        raise UserError(
            f"FastV's formula needs one hidden_size and one intermediate_size; found {found} in the "
            f"configuration of {architecture.name}"
        )
    return found  # type: ignore[return-value]
