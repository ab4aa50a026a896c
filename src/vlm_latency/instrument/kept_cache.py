"""A cache of keys and values that stays where it is, from one request to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from vlm_latency.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class KeptLayer(StaticLayer):
    """A static cache layer that knows on the host whether it is empty.

    While it is, keys and values are written to its start and given back as they came: a prefill
    attends to its own length, by the same kernels as without a static cache, and nothing waits for
    the device to say how long the cache is. Layers with a sliding window keep all positions too;
    the mask restricts what they attend to.

    A prefill writes through tensors of its own on the same memory, whose length a compiler may not
    rely on: it is compiled once for all lengths of the cache, a decode step for each.
    """

    empty = True
    room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.empty:
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.room is not None
        length = key_states.shape[-2]
        for kept, states in zip(self.room, (key_states, value_states), strict=True):
            kept[:, :, :length].copy_(states)
        return key_states, value_states

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        self.room = self.keys.detach(), self.values.detach()
        for kept in self.room:
            torch._dynamo.maybe_mark_dynamic(kept, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.empty else self.max_cache_len), 0

    def get_seq_length(self) -> Any:
        return 0 if self.empty else self.cumulative_length


class KeptCache(StaticCache):
    """A static cache for one request after another, at the same addresses.

    ``generate()`` makes a new one for each request; a CUDA graph that was recorded with the old
    one's addresses is then recorded again, which is most of a slow first compiled step.
    """

    def __init__(self, config: PreTrainedConfig, max_cache_len: int) -> None:
        super().__init__(config, max_cache_len)
        kinds = {
            type(layer).__name__ for layer in self.layers if not isinstance(layer, StaticLayer)
        }
        if kinds:
            raise ModelError(f"its cache has layers that are not keys and values: {kinds}")
        self.max_len = max_cache_len
        self.layers: list[Any] = [KeptLayer(max_cache_len) for _ in self.layers]

    def start(self) -> None:
        """Forget the previous request; what it wrote is masked out."""
        for layer in self.layers:
            layer.empty = True

    def filled(self, length: int) -> None:
        """Say that the prefill has written so many positions."""
        lengths = [layer.cumulative_length for layer in self.layers]
        torch._foreach_zero_(lengths)
        torch._foreach_add_(lengths, length)
        for layer in self.layers:
            layer.empty = False
