"""The methods, written from their papers, and the interface of one's own.

A method is a class with one function, `Method.select`: it is given what `Seen` holds and returns
`Kept`. A file of one's own with such a class is named as ``mine.py:MyMethod``.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vlm_latency.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Seen:
    """What a method sees of one request.

    Attributes
    ----------
    features : float tensor (n, d)
        The vision tokens where the method acts, in the order of the prompt.
    count : int
        How many of them to keep.
    attention : float tensor (n,) or None
        Where `Method.needs_attention`: before the decoder, what the encoder's class token gives to
        each token (without one: what it receives on average); inside of it, what the prompt's last
        token gives. Averaged over heads.
    """

    features: torch.Tensor
    count: int
    attention: torch.Tensor | None = None


@dataclass(frozen=True)
class Kept:
    """What a method returns.

    Attributes
    ----------
    index : int tensor (count,)
        The tokens kept, each at its own position in the prompt.
    features : float tensor (count, d) or None
        What they become; None: what they were.
    """

    index: torch.Tensor
    features: torch.Tensor | None = None


class Method:
    """A way to reduce vision tokens.

    Attributes
    ----------
    source
        Where it is published.
    deviations
        In what it differs from there.
    where
        ``image``: on the picture, before the processor; ``decoder``: on the decoder's inputs;
        ``layer``: between two layers of the decoder, before layer `layer` (counted from 0).
    needs_attention
        Whether attention weights are computed for it; see `Seen`.
    """

    source: ClassVar[str] = ""
    deviations: ClassVar[str] = ""
    where: ClassVar[Literal["image", "decoder", "layer"]] = "decoder"
    layer: ClassVar[int] = 0
    needs_attention: ClassVar[bool] = False

    def select(self, seen: Seen) -> Kept:
        """Choose `seen.count` tokens; on the device, and without waiting for it where possible."""
        raise NotImplementedError


class Identity(Method):
    """Everything but dropping: the same hooks, all tokens kept."""

    source = "control"

    def select(self, seen: Seen) -> Kept:
        import torch

        return Kept(torch.arange(len(seen.features), device=seen.features.device))


class Pixels(Method):
    """A smaller image: the largest whose tokens are no more than asked for."""

    source = "downsampling, as in VTC-Bench, arXiv 2510.07143"
    deviations = "models of one fixed resolution keep all tokens whatever the image's size"
    where = "image"


class Random(Method):
    """Tokens by chance, the same for every request of so many."""

    source = "control"

    def select(self, seen: Seen) -> Kept:
        import torch

        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(seen.features), generator=generator)[: seen.count]
        return Kept(chosen.to(seen.features.device))


class Uniform(Method):
    """Tokens at equal distances in the order of the prompt."""

    source = "control"

    def select(self, seen: Seen) -> Kept:
        import torch

        steps = torch.arange(seen.count, device=seen.features.device)
        return Kept((2 * steps + 1) * len(seen.features) // (2 * seen.count))


class Attention(Method):
    """Tokens that the encoder attends to most."""

    source = "FasterVLM, arXiv 2412.01818; the dominant tokens of VisionZip, arXiv 2412.04467"
    deviations = "no contextual tokens; patches that become one token are averaged"
    needs_attention = True

    def select(self, seen: Seen) -> Kept:
        assert seen.attention is not None
        return Kept(seen.attention.topk(seen.count).indices)


class Diversity(Method):
    """Tokens as unlike as possible: greedy max–min of the cosine distance."""

    source = "DivPrune, arXiv 2503.02175"
    deviations = "on the decoder's inputs: Molmo's hold the embedding that features are added to"

    def select(self, seen: Seen) -> Kept:
        import torch

        unit = torch.nn.functional.normalize(seen.features.float(), dim=-1)
        distance = (1 - unit @ unit.T).fill_diagonal_(torch.inf)
        chosen = torch.empty(seen.count, dtype=torch.long, device=unit.device)
        chosen[0] = distance.amin(dim=1).argmax()  # farthest from its nearest
        distance.fill_diagonal_(0)
        nearest = distance[chosen[0]].clone()
        for place in range(1, seen.count):
            nearest[chosen[:place]] = -1  # never twice, also among equal tokens
            chosen[place] = nearest.argmax()
            nearest = torch.minimum(nearest, distance[chosen[place]])
        return Kept(chosen)


class Merging(Method):
    """Tokens merged with those they are most like: bipartite soft matching."""

    source = "ToMe, arXiv 2210.09461"
    deviations = "in rounds before the decoder rather than within each block of the encoder"

    def select(self, seen: Seen) -> Kept:
        import torch

        features, index = seen.features, torch.arange(len(seen.features))
        index = index.to(features.device)
        size = torch.ones(len(features), 1, device=features.device)
        while len(features) > seen.count:
            unit = torch.nn.functional.normalize(features.float(), dim=-1)
            likeness, partner = (unit[::2] @ unit[1::2].T).max(dim=1)
            drop = min(len(features) - seen.count, len(features) // 2)
            order = likeness.argsort(descending=True)
            gone, stay = order[:drop], order[drop:].sort().values
            into = 2 * partner[gone] + 1
            mass = features.float() * size
            mass = mass.index_add(0, into, mass[2 * gone])
            size = size.index_add(0, into, size[2 * gone])
            odd = torch.arange(1, len(features), 2, device=features.device)
            left = torch.cat([2 * stay, odd]).sort().values
            features, size, index = (mass / size)[left].to(features), size[left], index[left]
        return Kept(index, features)


class LLMAttention(Method):
    """Tokens that the prompt's last one attends to most in the decoder's second layer."""

    source = "FastV, arXiv 2403.06764, K = 2"
    deviations = (
        "the layer stays on its fast kernel, and the last query's weights are computed besides; "
        "the paper's code takes the whole matrix from eager attention"
    )
    where = "layer"
    layer = 2
    needs_attention = True

    def select(self, seen: Seen) -> Kept:
        assert seen.attention is not None
        return Kept(seen.attention.topk(seen.count).indices)


METHODS: dict[str, type[Method]] = {
    "identity": Identity,
    "pixels": Pixels,
    "random": Random,
    "uniform": Uniform,
    "attention": Attention,
    "diversity": Diversity,
    "merging": Merging,
    "llm-attention": LLMAttention,
}


def method_of(name: str) -> Method:
    """Make a method of a name of `METHODS`, or of ``file.py:Class``.

    Raises
    ------
    UserError
        For an unknown name, a file that cannot be read, or a class that is no `Method`.
    """
    if name in METHODS:
        return METHODS[name]()
    path, _, attribute = name.rpartition(":")
    if not path.endswith(".py"):
        raise UserError(
            f"found method {name!r}; expected one of {', '.join(METHODS)}, or a file and its class "
            "such as mine.py:MyMethod"
        )
    if not Path(path).is_file():
        raise UserError(f"method {name!r}: there is no file {path}; expected mine.py:MyMethod")
    found: Any = None
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found = getattr(module, attribute, None)
    except Exception as error:  # whatever a user's file does
        raise UserError(
            f"method {name!r} cannot be read: {type(error).__name__}: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UserError(
            f"{path} has no class {attribute} made from vlm_latency.reduction.Method; give one"
        )
    return found()


def refusal(method: Method, engine: str) -> str:
    """Say why an engine cannot run a method; empty where it can."""
    if method.where == "layer" and engine != "eager":
        return "its cache lengths differ by layer, which a static cache has not"
    if method.needs_attention and engine in ("compiled-all", "loop"):
        return "it needs the encoder's attention weights, and the encoder is compiled whole"
    return ""
