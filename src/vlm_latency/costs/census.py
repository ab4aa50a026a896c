"""What work a model's modules do, and once per what: the base of all arithmetic on costs.

`take_census` walks the modules of the real architecture (on the meta device: shapes without
memory) and files every linear layer, convolution, attention and expert under the *unit* it runs
once per. How many units a request has is arithmetic on its shape (`units`); FLOPs are then
Σ units × FLOPs per unit, with nothing run.

Units of the vision encoder: ``patch`` (patch embedding), ``position`` (patches and class tokens),
``pair`` and ``window_pair`` (query × key). Of the projector: ``merged`` (vectors it gives),
``pooled`` (vectors it pools), ``pooled_pair``. Of the decoder: ``token``, ``vision_token`` (what an
image's token costs more than one of text, where its experts are others), ``head`` (positions of
which logits are computed), ``pair`` and ``sliding_pair``.

What no rule knows is named in ``unknown`` and never guessed: a part with such an entry has no
analytic costs.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from vlm_latency.costs.shapes import RequestShape
from vlm_latency.models.experts import expert_sets

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
    vision_expert_weights: int = 0  # of experts that tokens of an image visit alone
    widest: int = 0
    unknown: list[str] = field(default_factory=list)

    def linear(self, unit: str, width_in: int, width_out: int, times: int = 1) -> None:
        """A product with a weight of width_in × width_out, `times` over (experts per token)."""
        self.flops[unit] += 2 * width_in * width_out * times
        self.elements[unit] += (width_in + width_out) * times
        # A layer's input, its output, and what an activation or a gate makes of it.
        self.widest = max(self.widest, width_in + 3 * width_out)

    def attention(self, unit: str, width: int) -> None:
        """Scores and weighted values: two products of `width` = heads × head size per pair."""
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
    embedding = model.get_input_embeddings().weight
    roots = (modules.vision_encoder, *modules.projector, modules.language_model, modules.head)
    vision, width, windows = _vision(Part(modules.vision_encoder, components.vision_encoder, roots))
    projectors = [
        Part(module, path, roots)
        for module, path in zip(modules.projector, components.projector, strict=True)
    ]
    projector, first, side = _projector(projectors)
    llm, kv_widths, num_experts, top_k = _decoder(
        Part(modules.language_model, components.language_model, roots)
    )
    llm.weights -= embedding.numel()
    head = Tally()
    for path, module in Part(modules.head, components.head, roots).modules():
        _file(head, path, module, "head")
    head.weights = _weights(modules.head, ())
    return Census(
        vision=vision,
        projector=projector,
        llm=llm,
        head=head,
        class_tokens=_class_tokens(modules.vision_encoder),
        windows=windows,
        merge=_merge(model_type, model.config, width, first, side, projector),
        bidirectional_images=model_type in BIDIRECTIONAL_IMAGES,
        parameters=_weights(model, ()),
        hidden_size=embedding.shape[1],
        vocab_rows=modules.head.weight.shape[0],
        num_experts=num_experts,
        top_k=top_k,
        kv_widths=kv_widths,
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


class Part:
    """One component's modules, without the other components inside it and what does not run."""

    def __init__(self, root: Any, path: str, roots: Sequence[Any]) -> None:
        self.root = root
        self.path = path
        inside = {id(module) for module in root.modules()}
        self.others = [other for other in roots if other is not root and id(other) in inside]

    def modules(self) -> Iterator[tuple[str, Any]]:
        """Every module that runs, with its full path."""
        left_out: set[int] = {id(inner) for other in self.others for inner in other.modules()}
        for name, module in self.root.named_modules():
            if id(module) in left_out:
                continue
            for idle in _idle(module):
                left_out.update(map(id, idle.modules()))
            yield ".".join(filter(None, (self.path, name))), module

    @property
    def weights(self) -> int:
        """Number of the component's own parameters."""
        return _weights(self.root, self.others)


def _idle(module: Any) -> Iterator[Any]:
    """What lies in a module and does not run with it.

    Adapters of peft that are merged, switched off or not active; of a parametrised weight, what
    makes it.
    """
    children = dict(module.named_children())
    if "parametrizations" in children:
        yield children["parametrizations"]
    if "base_layer" in children and hasattr(module, "active_adapters"):
        off = module.disable_adapters or module.merged
        for name, child in children.items():
            if name == "base_layer" or not hasattr(child, "items"):
                continue
            for adapter, inner in child.items():
                if hasattr(inner, "modules") and (off or adapter not in module.active_adapters):
                    yield inner


def _vision(part: Part) -> tuple[Tally, int, Windows | None]:
    """The encoder, the width of its attention, its windows."""
    encoder, windows = part.root, None
    if hasattr(encoder, "fullatt_block_indexes"):
        merge = encoder.spatial_merge_size
        windows = Windows(encoder.window_size // merge // encoder.patch_size, merge)
    tally, width = Tally(weights=part.weights), 0
    with _or_unknown(tally, part.path):
        for path, module in part.modules():
            block = next((int(piece) for piece in path.split(".") if piece.isdigit()), None)
            if _is_attention(module):
                width, _ = _attention_widths(module)
                local = windows is not None and block not in encoder.fullatt_block_indexes
                tally.attention("window_pair" if local else "pair", width)
                tally.elements["position"] += 4 * width
            else:
                _file(tally, path, module, "patch" if block is None else "position")
    return tally, width, windows


def _projector(parts: Sequence[Part]) -> tuple[Tally, int | None, int]:
    """The projector, the width that its first layer takes, the side of an average pooling."""
    tally, first, side = Tally(), None, 1
    for part in parts:
        tally.weights += part.weights
        with _or_unknown(tally, part.path):
            for path, module in part.modules():
                if _is_attention(module):
                    width, _ = _attention_widths(module)
                    tally.attention("pooled_pair", width)
                    tally.elements["merged"] += 2 * width
                    tally.elements["pooled"] += 2 * width
                elif type(module).__name__ == "AvgPool2d":
                    side = int(module.kernel_size)
                else:
                    keys = path.endswith(("k_proj", "v_proj"))
                    _file(tally, path, module, "pooled" if keys else "merged")
                    if first is None and hasattr(module, "in_features"):
                        first = module.in_features
                    if first is None and hasattr(module, "mm_input_projection_weight"):
                        first = module.mm_input_projection_weight.shape[0]
    return tally, first, side


def _decoder(part: Part) -> tuple[Tally, tuple[tuple[int, int | None], ...], int, int]:
    """The decoder, keys and values per layer, number of experts, experts per token."""
    tally, kv_widths, num_experts, top_k = Tally(weights=part.weights), [], 0, 0
    with _or_unknown(tally, part.path):
        sets = {id(found.module): found for found in expert_sets(part.root)}
        units_of = {
            id(inner): found.visitors
            for found in sets.values()
            for inner in (*found.router, found.module)
        }
        for path, module in part.modules():
            kind = type(module).__name__
            visitors = units_of.get(id(module), "all")
            if _is_attention(module):
                if "Cross" in kind:
                    tally.not_known(path, "attention to the image from within the decoder")
                width, kv_width = _attention_widths(module)
                window = getattr(module, "sliding_window", None)
                kv_widths.append((kv_width, window))
                tally.attention("sliding_pair" if window else "pair", width)
                tally.elements["token"] += 2 * width
            elif id(module) in sets:
                experts = sets[id(module)]
                num_experts, top_k = experts.number, experts.top_k
                for weight in experts.weights:
                    _visit(tally, visitors, weight.shape[2], weight.shape[1], top_k)
                tally.weights -= experts.parameters
                if visitors == "vision":
                    tally.vision_expert_weights += experts.parameters
                else:
                    tally.expert_weights += experts.parameters
                if not top_k:
                    tally.not_known(path, "how many experts a token visits")
            elif kind.startswith("Conv") or _is_recurrence(module):
                tally.not_known(path, "mixes positions, and not by attention")
            elif visitors != "all" and getattr(module, "weight", None) is not None:
                _visit(tally, visitors, *reversed(module.weight.shape))
            else:
                _file(tally, path, module, "token")
    return tally, tuple(kv_widths), num_experts, top_k


def _visit(tally: Tally, visitors: str, width_in: int, width_out: int, times: int = 1) -> None:
    """File experts: all tokens visit them, or those of the text or of the image alone."""
    if visitors != "vision":
        tally.linear("token", width_in, width_out, times)
    if visitors != "all":
        sign = 1 if visitors == "vision" else -1
        tally.linear("vision_token", width_in, width_out, sign * times)


@contextmanager
def _or_unknown(tally: Tally, path: str) -> Iterator[None]:
    """What a rule stumbles over is not known: any module may have an attribute of another kind."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        tally.not_known(path, f"{type(error).__name__}: {error}")


def _weights(root: Any, excluded: Sequence[Any]) -> int:
    left_out = {id(weight) for module in excluded for weight in module.parameters()}
    return sum(weight.numel() for weight in root.parameters() if id(weight) not in left_out)


def _file(tally: Tally, path: str, module: Any, unit: str) -> None:
    """File the module's own parameters (not its children's) under a unit."""
    kind = type(module).__name__
    weight: Any = getattr(module, "weight", None)
    if _is_linear(module):
        tally.linear(unit, module.in_features, module.out_features)
        _made_weights(tally, path, module)
    elif kind.startswith("Conv") and weight is not None:
        # Patch embeddings: kernel = stride, so each output position reads its own pixels.
        if tuple(module.kernel_size) != tuple(module.stride):
            tally.not_known(path, "a convolution whose windows overlap")
        tally.linear(unit, math.prod(weight.shape[1:]), weight.shape[0])
    elif "Router" in kind and weight is not None:
        tally.linear(unit, weight.shape[1], weight.shape[0])
    else:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 2 and name.endswith("projection_weight"):
                tally.linear(unit, *parameter.shape)
            elif (
                parameter.ndim > 1
                and "bias" not in name
                and not any(table in f"{kind}.{name}".lower() for table in TABLES)
            ):
                tally.not_known(f"{path}.{name}")


def _made_weights(tally: Tally, path: str, module: Any) -> None:
    """A parametrised weight is made anew in each forward; products in that are not known."""
    for made in getattr(module, "parametrizations", {}).values():
        if any(x.ndim > 1 and not n.startswith("original") for n, x in made.named_parameters()):
            tally.not_known(f"{path}.parametrizations", "products that make a weight")


def _has_width(module: Any) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def _is_linear(module: Any) -> bool:
    """A layer that multiplies by one weight; what wraps another layer leaves that to it."""
    return _has_width(module) and not any(
        _has_width(inner)
        for name, child in module.named_children()
        if name != "parametrizations"
        for inner in child.modules()
    )


def _is_attention(module: Any) -> bool:
    linears = [child for child in module.children() if _has_width(child)]
    return "Attention" in type(module).__name__ and len(linears) > 1


def _is_recurrence(module: Any) -> bool:
    """State-space models and delta rules have a decay per head or channel."""
    return any("A_log" in name for name, _ in module.named_parameters(recurse=False))


def _attention_widths(module: Any) -> tuple[int, int]:
    """Heads × head size, the mean of keys' and values'; and of both what is cached of a token."""
    if hasattr(module, "qk_head_dim") and hasattr(module, "v_head_dim"):  # latent attention
        both = module.num_heads * (module.qk_head_dim + module.v_head_dim)
        return both // 2, both
    children = dict(module.named_children())
    linears = [child for child in children.values() if _has_width(child)]
    width = linears[-1].in_features
    return width, 2 * (children["k_proj"].out_features if "k_proj" in children else width)


def _class_tokens(encoder: Any) -> int:
    names = {name.rsplit(".", 1)[-1] for name, _ in encoder.named_parameters()}
    return int(bool(names & {"class_embedding", "cls_token"}))


def _merge(
    model_type: str, config: Any, width: int, first: int | None, side: int, tally: Tally
) -> Fraction | None:
    """Patches behind one projected vector, from how wide the projector's first layer is."""
    if model_type == "molmo2" or first is None:
        return None
    if model_type == "molmo":
        return Fraction(POOL_WINDOW)
    layers = getattr(config, "vision_feature_layer", None)
    joined = width * (len(layers) if isinstance(layers, list) else 1)
    if not joined or not first:
        tally.not_known("projector", "how many patches it takes together")
        return None
    return Fraction(first * side**2, joined)
