"""The work of a model's parts in units, and how many units a request has.

Units of the vision encoder: ``patch`` (patch embedding), ``position`` (patches and class tokens),
``pair`` and ``window_pair`` (query × key). Of the projector: ``merged`` (vectors it gives),
``pooled`` (vectors it pools), ``pooled_pair``. Of the decoder: ``token``, ``vision_token`` (what an
image's token costs more than one of text, where its experts are others), ``head`` (positions of
which logits are computed), ``pair`` and ``sliding_pair``.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from vlm_latency.costs.shapes import RequestShape

# Molmo and Molmo2 pool windows of 2 × 2 patches by attention.
POOL_WINDOW = 4

CROSS_ATTENTION = "attends to the image from within the decoder"


@dataclass(frozen=True)
class Windows:
    """Attention of a vision encoder within windows (Qwen2.5-VL); sizes in patches.

    Patches are grouped `merge` × `merge`; a window is `side` groups wide.
    """

    side: int
    merge: int

    def pairs(self, height: int, width: int) -> int:
        """Sum of squared window sizes over a grid of height × width patches.

        >>> Windows(side=2, merge=2).pairs(6, 4)  # groups 3 × 2: windows of 16 and 8 patches
        320
        """
        squares = 1
        for groups in (height // self.merge, width // self.merge):
            full, rest = divmod(groups, self.side)
            squares *= full * self.side**2 + rest**2
        return squares * self.merge**4

    def number(self, height: int, width: int) -> int:
        """Count the windows of a grid of height × width patches.

        >>> Windows(side=2, merge=2).number(6, 4)
        2
        """
        cell = self.side * self.merge
        return -(-height // cell) * -(-width // cell)


@dataclass
class Tally:
    """Work of one component: FLOPs and activation elements per unit, and its weights.

    `elements` are those that matrix products and attention read and write; element-wise
    operations are left out. `widest` is the largest number of elements that one position holds
    inside a layer at once.
    """

    flops: Counter[str] = field(default_factory=Counter)
    elements: Counter[str] = field(default_factory=Counter)
    weights: int = 0
    expert_weights: int = 0
    vision_expert_weights: int = 0  # of experts that tokens of an image visit alone
    widest: int = 0
    unknown: list[str] = field(default_factory=list)

    def linear(self, unit: str, width_in: int, width_out: int, times: int = 1) -> None:
        """Count a product with a width_in × width_out weight, `times` over (experts per token)."""
        self.flops[unit] += 2 * width_in * width_out * times
        self.elements[unit] += (width_in + width_out) * times
        # A layer's input, its output, and what an activation or a gate makes of it.
        self.widest = max(self.widest, width_in + 3 * width_out)

    def attention(self, unit: str, width: int) -> None:
        """Count scores and weighted values: two products of `width` (heads × head size) a pair."""
        self.flops[unit] += 4 * width

    def not_known(self, path: str, reason: str = "") -> None:
        """Name a module that no rule fits; equal ones of several blocks once."""
        name = re.sub(r"\b\d+\b", "*", path) + (f" ({reason})" if reason else "")
        if name not in self.unknown:
            self.unknown.append(name)


@dataclass(frozen=True)
class Census:
    """The work of all components; what `units` needs; what no rule knew."""

    vision: Tally
    projector: Tally
    llm: Tally
    head: Tally
    class_tokens: int
    windows: Windows | None
    merge: Fraction | None  # patches per projected vector; None: one vector per vision token
    bidirectional_images: bool
    parameters: int
    hidden_size: int
    vocab_rows: int
    num_experts: int
    top_k: int
    kv_widths: tuple[tuple[int, int | None], ...]  # per layer: keys and values; sliding window
    layers: tuple[dict[str, int], ...]  # of the decoder: FLOPs per unit

    @property
    def unknown(self) -> tuple[str, ...]:
        """Modules whose work no rule knows."""
        return tuple(name for names in self.unknown_by_part.values() for name in names)

    @property
    def unknown_by_part(self) -> dict[str, tuple[str, ...]]:
        """The same for vision, projector and llm; of those without, nothing."""
        found = {
            "vision": self.vision.unknown,
            "projector": self.projector.unknown,
            "llm": [*self.llm.unknown, *self.head.unknown],
        }
        return {part: tuple(names) for part, names in found.items() if names}

    def to_json(self) -> dict[str, Any]:
        """Give all fields as JSON holds them; see `from_json`."""
        return {
            **vars(self),
            **{part: vars(getattr(self, part)) for part in ("vision", "projector", "llm", "head")},
            "windows": self.windows and vars(self.windows),
            "merge": self.merge and [self.merge.numerator, self.merge.denominator],
        }

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Census:
        """Make the census that `to_json` gave."""

        def tally(values: dict[str, Any]) -> Tally:
            counts = {name: Counter(values[name]) for name in ("flops", "elements")}
            return Tally(**{**values, **counts})

        windows, merge = plain["windows"], plain["merge"]
        return cls(
            **{
                **plain,
                **{part: tally(plain[part]) for part in ("vision", "projector", "llm", "head")},
                "windows": windows and Windows(**windows),
                "merge": merge and Fraction(*merge),
                "layers": tuple(plain["layers"]),
                "kv_widths": tuple((width, window) for width, window in plain["kv_widths"]),
            }
        )

    @property
    def has_cross_attention(self) -> bool:
        """Whether image features enter the decoder beside its tokens: no part runs by itself."""
        return any(CROSS_ATTENTION in name for name in self.llm.unknown)

    @property
    def sliding_window(self) -> int | None:
        """Keys that a sliding layer sees; the same in all of them."""
        return next((window for _, window in self.kv_widths if window), None)


# Of the null model, which has no modules.
NO_WORK = Census(
    vision=Tally(),
    projector=Tally(),
    llm=Tally(),
    head=Tally(),
    class_tokens=0,
    windows=None,
    merge=None,
    bidirectional_images=False,
    parameters=0,
    hidden_size=0,
    vocab_rows=0,
    num_experts=0,
    top_k=0,
    kv_widths=(),
    layers=(),
)


def units(census: Census, shape: RequestShape, grid_pairs: Any = 0) -> dict[str, dict[str, Any]]:
    """Count the units of each part of a request, as executed (full-square attention in prefill).

    Parameters
    ----------
    census : Census
    shape : RequestShape
    grid_pairs
        Sum of squared window sizes, for encoders with `windows`.
    """
    crops = np.asarray(shape.num_crops, dtype=np.int64)
    patches = np.asarray(shape.num_vision_patches, dtype=np.int64)
    per_crop = patches // np.maximum(crops, 1) + census.class_tokens
    merged = np.asarray(shape.num_vision_tokens, dtype=np.int64)
    if census.merge is not None:
        merged = patches * census.merge.denominator // census.merge.numerator
    prompt = np.asarray(shape.num_total_tokens, dtype=np.int64)
    steps = np.asarray(shape.decode_steps, dtype=np.int64)
    return {
        "vision": {
            "patch": patches,
            "position": crops * per_crop,
            "pair": crops * per_crop**2,
            "window_pair": grid_pairs,
        },
        "projector": {
            "merged": merged,
            "pooled": merged * POOL_WINDOW,
            "pooled_pair": merged * POOL_WINDOW,
        },
        "llm_prefill": {
            "token": prompt,
            "vision_token": np.asarray(shape.num_vision_tokens, dtype=np.int64),
            "head": np.ones_like(prompt),
            "pair": prompt**2,
            "sliding_pair": prompt**2,
        },
        "llm_decode": {
            "token": steps,
            "vision_token": np.zeros_like(steps),
            "head": steps,
            "pair": cache_sum(prompt, steps),
            "sliding_pair": cache_sum(prompt, steps, census.sliding_window),
        },
    }


def causal_pairs(census: Census, shape: RequestShape) -> dict[str, Any]:
    """Count the query × key pairs of prefill that the causal mask leaves.

    Where images see themselves in both directions, the pairs above the diagonal within the image
    are added (taken as one block).
    """
    prompt = np.asarray(shape.num_total_tokens, dtype=np.int64)
    image = np.asarray(shape.num_vision_tokens, dtype=np.int64)
    window = census.sliding_window
    upper = image * (image - 1) // 2 if census.bidirectional_images else 0
    zero = np.zeros_like(prompt)
    return {
        "pair": cache_sum(zero, prompt) + upper,
        "sliding_pair": cache_sum(zero, prompt, window) + upper,
    }


def cache_sum(start: Any, steps: Any, window: int | None = None) -> Any:
    """Sum the keys seen by `steps` queries, the first of which sees start + 1, in closed form.

    Σ_{t=1…steps} min(start + t, window)

    >>> int(cache_sum(10, 3)), int(cache_sum(10, 3, window=12))  # 11+12+13, 11+12+12
    (36, 35)
    """
    start, steps = np.asarray(start, dtype=np.int64), np.asarray(steps, dtype=np.int64)
    if window is None:
        return steps * start + steps * (steps + 1) // 2
    growing = np.clip(window - start, 0, steps)
    return growing * start + growing * (growing + 1) // 2 + (steps - growing) * window
