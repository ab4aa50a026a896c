"""Equal blocks are counted once.

A model repeats a few kinds of blocks. `EqualBlocks` runs the first block of each kind on each kind
of argument; for all others it gives what the first one gave (tensors without values) and what the
first one cost. Two blocks are equal when their modules, weights' shapes and settings are, save for
their number; two calls when shapes, types and all values that are known are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

# A block's place among its like, in the spellings that transformers has.
NUMBERS = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx", "idx"})
PLAIN = (int, float, str, bool, type(None), torch.dtype)


class UnlikeError(Exception):
    """An argument that cannot be compared."""


@dataclass(frozen=True)
class Count:
    """What a forward costs."""

    flops: int = 0
    launches: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.flops + other.flops, self.launches + other.launches)

    def __sub__(self, other: Count) -> Count:
        return Count(self.flops - other.flops, self.launches - other.launches)


class EqualBlocks:
    """Runs equal blocks of one model once; remembers them from forward to forward.

    Parameters
    ----------
    model : nn.Module
        On the meta device. Blocks are the items of its module lists that are at least two.
    whole : modules
        Also remembered, as one: a component that runs on images of equal shapes.
    """

    def __init__(self, model: nn.Module, whole: Iterable[nn.Module] = ()) -> None:
        self.blocks = [
            *whole,
            *(
                block
                for blocks in model.modules()
                if isinstance(blocks, nn.ModuleList) and len(blocks) > 1
                for block in blocks
            ),
        ]
        self._kinds: dict[int, Any] = {}
        self._known: dict[Any, tuple[Any, Any, Count]] = {}

    @contextmanager
    def running(self, read: Callable[[], Count], add: Callable[[Count], None]) -> Iterator[None]:
        """Take the place of the blocks' forwards; `read` gives the count so far."""
        replaced: list[tuple[nn.Module, Any]] = []
        try:
            for block in self.blocks:
                replaced.append((block, vars(block).get("forward")))
                block.forward = self._once(block, block.forward, read, add)
            yield
        finally:
            for block, own in reversed(replaced):
                if own is None:
                    del block.forward
                else:
                    block.forward = own

    def _once(
        self,
        block: nn.Module,
        forward: Callable[..., Any],
        read: Callable[[], Count],
        add: Callable[[Count], None],
    ) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            caches: list[Any] = [x for x in (*args, *kwargs.values()) if isinstance(x, Cache)]
            try:
                number = _number(block) if caches else 0
                key = (self._kind(block), _likeness((args, kwargs), number))
            except UnlikeError:
                return forward(*args, **kwargs)
            if key in self._known:
                given, kept, count = self._known[key]
                for cache, layer in zip(caches, kept, strict=True):
                    cache.layers[number] = copied_layer(layer)
                add(count)
                return _rebuilt(given)
            before = read()
            given = forward(*args, **kwargs)
            if all(x.is_meta for x in tree_leaves(given) if isinstance(x, torch.Tensor)):
                kept = [copied_layer(cache.layers[number]) for cache in caches]
                self._known[key] = _rebuilt(given), kept, read() - before
            return given

        return run

    def _kind(self, block: nn.Module) -> Any:
        if id(block) not in self._kinds:
            self._kinds[id(block)] = tuple(
                (
                    path,
                    type(module),
                    tuple(
                        (name, value)
                        for name, value in sorted(vars(module).items())
                        if isinstance(value, PLAIN) and name not in NUMBERS
                    ),
                    tuple(
                        (name, tuple(x.shape))
                        for tensors in (module.named_parameters, module.named_buffers)
                        for name, x in tensors(recurse=False)
                    ),
                )
                for path, module in block.named_modules()
            )
        return self._kinds[id(block)]


def _number(block: nn.Module) -> int:
    """Which layer of a cache is the block's own."""
    for module in block.modules():
        for name in NUMBERS:
            if isinstance(found := vars(module).get(name), int):
                return found
    raise UnlikeError


def _likeness(value: Any, number: int) -> Any:
    """What two arguments have in common when a block costs the same on both."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, None if value.is_meta else _bytes(value)
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, list | tuple):
        return tuple(_likeness(item, number) for item in value)
    if isinstance(value, dict):
        return tuple((name, _likeness(item, number)) for name, item in value.items())
    if isinstance(value, PreTrainedConfig):
        return id(value)
    if isinstance(value, Cache) and number < len(value.layers):
        layer = value.layers[number]
        return type(layer), _likeness(
            {
                name: item
                for name, item in vars(layer).items()
                if not isinstance(item, torch.device)
            },
            number,
        )
    raise UnlikeError


def _bytes(tensor: torch.Tensor) -> bytes:
    """Values of a tensor, those that it repeats along an axis once; not counted as its reader's."""
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
    with _disable_current_modes():
        values = tensor[once]
        # numpy has no bfloat16; float32 holds its values.
        values = values.float() if values.dtype == torch.bfloat16 else values
        return values.numpy().tobytes()


def _rebuilt(given: Any) -> Any:
    """The same tensors in containers of their own, for a caller that writes into them."""
    return tree_map(lambda leaf: leaf, given)


def copied_layer(layer: Any) -> Any:
    """Copy a layer of a cache: lists of its own; tensors are replaced, never written into."""
    copied = copy.copy(layer)
    for name, value in vars(copied).items():
        if isinstance(value, list | dict):
            setattr(copied, name, value.copy())
    return copied
