"""The experts of a mixture: how many there are, and how many of them a token visits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# How configurations and routers call the number of experts that a token visits.
TOP_K = ("top_k", "num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "topk", "experts_top_k")


@dataclass(frozen=True)
class ExpertSet:
    """Experts of one layer among which one router chooses.

    Attributes
    ----------
    module
        Holds `weights`, each of shape (experts, …).
    router
        Modules beside it that choose, if they are told apart by name.
    top_k
        Experts that a token visits; 0 where nothing says so.
    visitors
        ``all``; ``text`` or ``vision`` where a layer has a set for each kind of token.
    """

    module: nn.Module
    router: tuple[nn.Module, ...]
    weights: tuple[nn.Parameter, ...]
    top_k: int
    visitors: str

    @property
    def number(self) -> int:
        """Experts in the set."""
        return int(self.weights[0].shape[0])

    @property
    def parameters(self) -> int:
        """Parameters of all experts."""
        return sum(weight.numel() for weight in self.module.parameters(recurse=False))


def expert_sets(decoder: nn.Module) -> list[ExpertSet]:
    """Find the sets of experts in a decoder.

    A set is a module with own weights of three dimensions, one row per expert, as transformers
    keeps them. Two sets in one layer, one of them called ``vision``, are for one kind of token
    each: a token visits one of them.
    """
    modules = dict(decoder.named_modules())
    found = []
    for path, module in modules.items():
        own = [weight for weight in module.parameters(recurse=False) if weight.ndim == 3]
        if not own or "expert" not in type(module).__name__.lower():
            continue
        parent = modules[path.rpartition(".")[0]]
        router = tuple(
            child
            for name, child in parent.named_children()
            if child is not module and name in ("gate", "router") and hasattr(child, "weight")
        )
        top_k = _top_k(module, *router, parent, getattr(decoder, "config", None))
        found.append((path, ExpertSet(module, router, tuple(own), top_k, "all")))
    layers: dict[str, list[str]] = {}
    for path, _ in found:
        layers.setdefault(path.rpartition(".")[0].rpartition(".")[0], []).append(path)
    mixed = {
        path
        for paths in layers.values()
        if len(paths) > 1 and any("vision" in path for path in paths)
        for path in paths
    }
    return [
        experts
        if path not in mixed
        else ExpertSet(
            experts.module,
            experts.router,
            experts.weights,
            experts.top_k,
            "vision" if "vision" in path.rsplit(".", 2)[-2] else "text",
        )
        for path, experts in found
    ]


def _top_k(*holders: Any) -> int:
    for holder in holders:
        for name in TOP_K:
            if isinstance(found := getattr(holder, name, None), int):
                return found
    return 0
