"""The work of a model's modules per token, patch or other unit: the base of all analytic costs.

`take_census` walks the modules of the real architecture (on the meta device: shapes without
memory) and files every linear layer, convolution, attention and expert under the *unit* it runs
once per. How many units a request has is arithmetic on its shape (`costs.units`); FLOPs are then
Σ units × FLOPs per unit, with nothing run.

What no rule knows is named in ``unknown`` and never guessed: a part with such an entry has no
analytic costs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

from vlm_latency.costs.units import CROSS_ATTENTION, POOL_WINDOW, Census, Tally, Windows
from vlm_latency.errors import UserError
from vlm_latency.models.experts import expert_sets

# Positions of an image see each other in both directions in these decoders.
BIDIRECTIONAL_IMAGES = frozenset({"gemma3", "molmo2"})

# Tables that are looked up or added, never multiplied.
TABLES = ("embed", "position", "token", "newline", "pad_")


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

    Raises
    ------
    UserError
        For a model that lacks what all models have: a head with a weight, input embeddings.
    """
    try:
        return _census(model, components, model_type)
    except UserError:
        raise
    except Exception as error:  # an architecture may lack anything that all others have
        raise UserError(
            f"the costs of model_type {model_type!r} are not known: its modules are not of the form "
            f"that is understood ({type(error).__name__}: {error})"
        ) from error


def _census(model: Any, components: Any, model_type: str) -> Census:
    modules = components.resolve(model)
    embedding = model.get_input_embeddings().weight
    roots = (modules.vision_encoder, *modules.projector, modules.language_model, modules.head)
    vision, width, windows = _vision(Part(modules.vision_encoder, components.vision_encoder, roots))
    for path in components.more_encoders:
        vision.not_known(path, "a second vision encoder")
    projectors = [
        Part(module, path, roots)
        for module, path in zip(modules.projector, components.projector, strict=True)
    ]
    projector, first, side = _projector(projectors)
    llm, layers, kv_widths, num_experts, top_k = _decoder(
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
        layers=layers,
    )


class Part:
    """One component's modules, without the other components inside it and what does not run."""

    def __init__(self, root: Any, path: str, roots: Sequence[Any]) -> None:
        self.root = root
        self.path = path
        inside = {id(module) for module in root.modules()}
        self.others = [other for other in roots if other is not root and id(other) in inside]

    def modules(self) -> Iterator[tuple[str, Any]]:
        """Give every module that runs, with its full path."""
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


def _decoder(
    part: Part,
) -> tuple[Tally, tuple[dict[str, int], ...], tuple[tuple[int, int | None], ...], int, int]:
    """The decoder, its FLOPs, keys and values by layer, number of experts, experts per token."""
    tally, kv_widths, num_experts, top_k = Tally(weights=part.weights), [], 0, 0
    layers: dict[int, Counter[str]] = {}
    with _or_unknown(tally, part.path):
        sets = {id(found.module): found for found in expert_sets(part.root)}
        units_of = {
            id(inner): found.visitors
            for found in sets.values()
            for inner in (*found.router, found.module)
        }
        for path, module in part.modules():
            kind, before = type(module).__name__, Counter(tally.flops)
            visitors = units_of.get(id(module), "all")
            if _is_attention(module):
                if "Cross" in kind:
                    tally.not_known(path, CROSS_ATTENTION)
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
            number = next((int(x) for x in path.split(".") if x.isdigit()), None)
            if number is not None and tally.flops != before:
                tally.flops.subtract(before)
                layers.setdefault(number, Counter()).update(tally.flops)
                tally.flops.update(before)
    return tally, tuple(map(dict, layers.values())), tuple(kv_widths), num_experts, top_k


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
