"""What work a model's modules do, and once per what: the base of all arithmetic on costs.

`take_census` walks the modules of the real architecture (on the meta device: shapes without
memory) and files every linear layer, convolution, attention and expert under the *unit* it runs
once per. How many units a request has is arithmetic on its shape (`units`); FLOPs are then
Σ units × FLOPs per unit, with nothing run.

Units of the vision encoder: ``patch`` (patch embedding), ``position`` (patches and class tokens),
``pair`` and ``window_pair`` (query × key). Of the projector: ``merged`` (vectors it gives),
``pooled`` (vectors it pools), ``pooled_pair``. Of the decoder: ``token``, ``head`` (positions of
which logits are computed), ``pair`` and ``sliding_pair``.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from vlm_latency.costs.shapes import RequestShape

logger = logging.getLogger(__name__)

# Molmo and Molmo2 pool windows of 2 × 2 patches by attention.
POOL_WINDOW = 4

# Positions of an image see each other in both directions in these decoders.
BIDIRECTIONAL_IMAGES = frozenset({"gemma3", "molmo2"})

# Tables that are looked up or added, never multiplied.
TABLES = ("embed", "position", "token", "newline", "pad_")


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
        """How many windows a grid of height × width patches has.

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
    widest: int = 0

    def linear(self, unit: str, width_in: int, width_out: int, times: int = 1) -> None:
        """A product with a weight of width_in × width_out, `times` over (experts per token)."""
        self.flops[unit] += 2 * width_in * width_out * times
        self.elements[unit] += (width_in + width_out) * times
        # A layer's input, its output, and what an activation or a gate makes of it.
        self.widest = max(self.widest, width_in + 3 * width_out)

    def attention(self, unit: str, width: int) -> None:
        """Scores and weighted values: two products of `width` = heads × head size per pair."""
        self.flops[unit] += 4 * width


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
    unknown: tuple[str, ...]

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
    unknown=(),
)


def take_census(model: Any, components: Any, model_type: str) -> Census:
    """Walk the modules of `model`.

    Parameters
    ----------
    model : nn.Module
        The whole model, on any device (meta is enough).
    components : Components
        Which module is the vision encoder, the projector, the language model and the head.
    model_type : str
        transformers' name of the architecture.
    """
    modules = components.resolve(model)
    unknown: list[str] = []
    vision, width, windows = _vision(modules.vision_encoder, modules.projector, unknown)
    projector, first, side = _projector(modules.projector, unknown)
    llm, kv_widths, num_experts, top_k = _decoder(modules.language_model, unknown)
    embedding = model.get_input_embeddings().weight
    llm.weights -= embedding.numel()
    head = Tally(weights=_weights(modules.head))
    _file(head, components.head, modules.head, "head", unknown)
    if unknown:
        logger.warning("no rule for the work of %s: not in the analytic FLOPs", ", ".join(unknown))
    return Census(
        vision=vision,
        projector=projector,
        llm=llm,
        head=head,
        class_tokens=_class_tokens(modules.vision_encoder),
        windows=windows,
        merge=_merge(model_type, model.config, width, first, side),
        bidirectional_images=model_type in BIDIRECTIONAL_IMAGES,
        parameters=_weights(model),
        hidden_size=embedding.shape[1],
        vocab_rows=modules.head.weight.shape[0],
        num_experts=num_experts,
        top_k=top_k,
        kv_widths=kv_widths,
        unknown=tuple(unknown),
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
            "head": np.ones_like(prompt),
            "pair": prompt**2,
            "sliding_pair": prompt**2,
        },
        "llm_decode": {
            "token": steps,
            "head": steps,
            "pair": cache_sum(prompt, steps),
            "sliding_pair": cache_sum(prompt, steps, census.sliding_window),
        },
    }


def causal_pairs(census: Census, shape: RequestShape) -> dict[str, Any]:
    """Query × key pairs of prefill that the causal mask leaves.

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


def _vision(
    encoder: Any, projectors: Sequence[Any], unknown: list[str]
) -> tuple[Tally, int, Windows | None]:
    """The encoder without a projector inside it, the width of its attention, its windows."""
    windows = None
    if hasattr(encoder, "fullatt_block_indexes"):
        merge = encoder.spatial_merge_size
        windows = Windows(encoder.window_size // merge // encoder.patch_size, merge)
    tally, width = Tally(weights=_weights(encoder, projectors)), 0
    for path, module in _walk(encoder, projectors):
        block = next((int(part) for part in path.split(".") if part.isdigit()), None)
        if _is_attention(module):
            width, _ = _attention_widths(module)
            local = windows is not None and block not in encoder.fullatt_block_indexes
            tally.attention("window_pair" if local else "pair", width)
            tally.elements["position"] += 4 * width
        else:
            _file(tally, path, module, "patch" if block is None else "position", unknown)
    return tally, width, windows


def _projector(projectors: Sequence[Any], unknown: list[str]) -> tuple[Tally, int | None, int]:
    """The projector, the width that its first layer takes, the side of an average pooling."""
    tally, first, side = Tally(), None, 1
    for root in projectors:
        tally.weights += _weights(root)
        for path, module in _walk(root):
            if _is_attention(module):
                width, _ = _attention_widths(module)
                tally.attention("pooled_pair", width)
                tally.elements["merged"] += 2 * width
                tally.elements["pooled"] += 2 * width
            elif type(module).__name__ == "AvgPool2d":
                side = int(module.kernel_size)
            else:
                keys = path.endswith(("k_proj", "v_proj"))
                _file(tally, path, module, "pooled" if keys else "merged", unknown)
                if first is None and hasattr(module, "in_features"):
                    first = module.in_features
                if first is None and hasattr(module, "mm_input_projection_weight"):
                    first = module.mm_input_projection_weight.shape[0]
    return tally, first, side


def _decoder(
    decoder: Any, unknown: list[str]
) -> tuple[Tally, tuple[tuple[int, int | None], ...], int, int]:
    """The decoder, keys and values per layer, number of experts, experts per token."""
    tally, kv_widths, num_experts, top_k = Tally(weights=_weights(decoder)), [], 0, 0
    for path, module in _walk(decoder):
        if _is_attention(module):
            width, kv_width = _attention_widths(module)
            window = getattr(module, "sliding_window", None)
            kv_widths.append((2 * kv_width, window))
            tally.attention("sliding_pair" if window else "pair", width)
            tally.elements["token"] += 2 * width
        elif _is_experts(module):
            num_experts, top_k = module.num_experts, decoder.config.num_experts_per_tok
            for weight in module.parameters(recurse=False):
                tally.linear("token", weight.shape[2], weight.shape[1], times=top_k)
                tally.weights -= weight.numel()
                tally.expert_weights += weight.numel()
        else:
            _file(tally, path, module, "token", unknown)
    return tally, tuple(kv_widths), num_experts, top_k


def _walk(root: Any, excluded: Sequence[Any] = ()) -> Iterator[tuple[str, Any]]:
    """Every module with its path, without the excluded subtrees."""
    left_out = {id(inner) for other in excluded for inner in other.modules()}
    for name, module in root.named_modules():
        if id(module) not in left_out:
            yield name, module


def _weights(root: Any, excluded: Sequence[Any] = ()) -> int:
    left_out = {id(weight) for module in excluded for weight in module.parameters()}
    return sum(weight.numel() for weight in root.parameters() if id(weight) not in left_out)


def _file(tally: Tally, path: str, module: Any, unit: str, unknown: list[str]) -> None:
    """File the module's own parameters (not its children's) under a unit."""
    kind = type(module).__name__
    weight: Any = getattr(module, "weight", None)
    if hasattr(module, "in_features"):
        tally.linear(unit, module.in_features, module.out_features)
    elif kind.startswith("Conv"):
        # Patch embeddings: kernel = stride, so each output position reads its own pixels.
        tally.linear(unit, math.prod(weight.shape[1:]), weight.shape[0])
    elif "Router" in kind:
        tally.linear(unit, weight.shape[1], weight.shape[0])
    else:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 2 and name.endswith("projection_weight"):
                tally.linear(unit, *parameter.shape)
            elif parameter.ndim > 1 and not any(
                table in f"{kind}.{name}".lower() for table in TABLES
            ):
                unknown.append(f"{path}.{name}")


def _is_attention(module: Any) -> bool:
    linears = [child for child in module.children() if hasattr(child, "in_features")]
    return "Attention" in type(module).__name__ and len(linears) > 1


def _is_experts(module: Any) -> bool:
    own = list(module.parameters(recurse=False))
    return bool(own) and all(weight.ndim == 3 for weight in own) and hasattr(module, "num_experts")


def _attention_widths(module: Any) -> tuple[int, int]:
    """Heads × head size of the queries (= width of what is projected out), and of the keys."""
    children = dict(module.named_children())
    linears = [child for child in children.values() if hasattr(child, "in_features")]
    width = linears[-1].in_features
    return width, children["k_proj"].out_features if "k_proj" in children else width


def _class_tokens(encoder: Any) -> int:
    names = {name.rsplit(".", 1)[-1] for name, _ in encoder.named_parameters()}
    return int(bool(names & {"class_embedding", "cls_token"}))


def _merge(
    model_type: str, config: Any, width: int, first: int | None, side: int
) -> Fraction | None:
    """Patches behind one projected vector, from how wide the projector's first layer is."""
    if model_type == "molmo2" or first is None:
        return None
    if model_type == "molmo":
        return Fraction(POOL_WINDOW)
    layers = getattr(config, "vision_feature_layer", None)
    return Fraction(first * side**2, width * (len(layers) if isinstance(layers, list) else 1))
