"""A model of the zoo as earlier commands found it: a report made again builds nothing of it."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vlm_latency.contents import Memory
from vlm_latency.models.architecture import Architecture, describe
from vlm_latency.models.components import Parameters
from vlm_latency.models.requests import TokenCounts
from vlm_latency.models.zoo import NULL, Family, is_path, load_zoo, own_file, weights_kind
from vlm_latency.molmo.tiling import Tiles

if TYPE_CHECKING:
    from vlm_latency.options import ModelOptions

_MOST_SIZES = 100  # of images; a dataset's thousands are counted anew


def is_known(options: ModelOptions) -> bool:
    """Say whether the zoo alone, and nothing that may change beside it, tells what a model is."""
    name = options.name
    elsewhere = not name or name == NULL or own_file(name) or is_path(name)
    more = options.revision or options.trust_remote_code or weights_kind(options) != "random"
    return not (elsewhere or more)


class KnownArchitecture(Architecture):
    """An `Architecture` that remembers what it was asked, and is made when something else is.

    Parameters
    ----------
    options
        Of a model that `is_known`, on a CPU.
    """

    own_modules = trust_remote_code = False

    def __init__(self, options: ModelOptions) -> None:
        zoo = load_zoo(options.zoo_file)
        self.name = str(options.name)
        entry = zoo.find(self.name)
        self.hub_id, self.model_type = entry.hub_id, entry.config["model_type"]
        family = zoo.families.get(self.model_type, Family())
        self.component_overrides = {**family.components, **entry.components}
        self._options = options
        given = options.model_dump(mode="json"), asdict(entry), asdict(family), platform.machine()
        self._memory = Memory.of("models", ("facts",), *given)

    def __getattr__(self, name: str) -> Any:
        if name == "_options" or name.startswith("__"):  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._whole, name)

    @cached_property
    def _whole(self) -> Architecture:
        return describe(self._options)

    def once(self, name: str, find: Callable[[], Any]) -> Any:
        """Give what this command or an earlier one found under a name: JSON."""
        known = self._memory["facts"]
        if name not in known:
            known[name] = find()
            self._memory.save()
        return known[name]

    @cached_property
    def config(self) -> dict[str, Any]:
        return dict(self.once("config", lambda: self._whole.config))

    @cached_property
    def max_positions(self) -> int | None:  # type: ignore[override]
        return self.once("max_positions", lambda: self._whole.max_positions)  # type: ignore[no-any-return]

    @cached_property
    def tiles(self) -> Tiles | None:  # type: ignore[override]
        cut = self.once("tiles", lambda: (tiles := self._whole.tiles) and asdict(tiles))
        return Tiles(**{**cut, "margins": tuple(cut["margins"])}) if cut else None

    @cached_property
    def parameters(self) -> Parameters:
        return Parameters(**self.once("parameters", lambda: asdict(self._whole.parameters)))

    def kv_bytes_per_token(self, dtype: str) -> int:
        return int(self.once(f"kv {dtype}", lambda: self._whole.kv_bytes_per_token(dtype)))

    def encoder_backend(self, device: str, dtype: str) -> str | None:
        chosen = self.once(f"kernel {dtype}", lambda: self._whole.encoder_backend(device, dtype))
        return chosen and str(chosen)

    def image_sizes_for_ladder(self, n: int) -> list[tuple[int, int]]:
        found = self.once(f"ladder {n}", lambda: self._whole.image_sizes_for_ladder(n))
        return [(width, height) for width, height in found]

    def _count_image(self, width: int, height: int) -> TokenCounts:
        name, facts = f"{width}x{height}", self._memory["facts"]
        if self.tiles is not None or (name not in facts and len(facts) > _MOST_SIZES):
            return super()._count_image(width, height)
        found = self.once(name, lambda: asdict(self._whole.image_tokens(width, height)))
        return TokenCounts(**found)
