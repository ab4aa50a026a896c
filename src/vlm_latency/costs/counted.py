"""FLOPs as PyTorch counts them: the real model's modules run on the meta device.

`torch.utils.flop_counter.FlopCounterMode` sees every matrix product, convolution and attention.
It does not suffice by itself: on a CPU it misses scaled-dot-product attention; on the meta
device several vision encoders fail, because grids, window limits and masks have values that the
code looks at; `grouped_mm` has no formula; ``generate()`` does not run. So

- `ShapesOnly` computes tensors that came from values (grids, positions, masks) on the CPU, and
  everything that a weight has touched on the meta device, shapes only. Attention decomposes into
  its two products there and is counted in full;
- experts are run as `batched_mm`, the same products that `grouped_mm` makes, token by token;
- components are run one by one: the vision part as ``get_image_features``, the decoder and the
  head on embeddings with a cache of the length in question.

Equal blocks are counted once (`EqualBlocks`); few lengths and images of many (`curves`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from vlm_latency.costs.blocks import Count, EqualBlocks, copied_layer

# Tokens of the prompt that shows what a cache looks like.
SHORT = 2


class ShapesOnly(TorchDispatchMode):
    """Values on the CPU, shapes on the meta device, whichever device the code asks for.

    `launches` counts the operations that would start a kernel: all but views.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.fused = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not (self.fused or func.is_view):
            self.launches += 1
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_meta = any(tensor.is_meta for tensor in tensors)
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("meta" if on_meta else "cpu")}
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], _as_positions(args[1]))
        if on_meta and not all(tensor.is_meta for tensor in tensors):
            args, kwargs = tree_map_only(torch.Tensor, lambda x: x.to("meta"), (args, kwargs))
        return func(*args, **kwargs)


class FusedAttention(TorchFunctionMode):
    """Counts scaled-dot-product attention as one launch, though meta runs it step by step.

    Where `read` and `add` are given attention on the same shapes is run once: an encoder with
    windows has hundreds of them.
    """

    def __init__(
        self,
        shapes: ShapesOnly,
        read: Callable[[], Count] | None = None,
        add: Callable[[Count], None] | None = None,
    ) -> None:
        super().__init__()
        self.shapes = shapes
        self.read = read
        self.add = add
        self.known: dict[Any, tuple[torch.Tensor, Count]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        if self.read is None or self.add is None:
            return self._fused(func, args, kwargs)
        key = tuple(
            (tuple(x.shape), x.dtype, x.is_meta) if isinstance(x, torch.Tensor) else x
            for x in (*args, *sorted(kwargs), *(kwargs[name] for name in sorted(kwargs)))
        )
        if key in self.known:
            given, count = self.known[key]
            self.add(count)
            return given
        before = self.read()
        given = self._fused(func, args, kwargs)
        if given.is_meta:
            self.known[key] = given, self.read() - before
        return given

    def _fused(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        self.shapes.launches += 1
        self.shapes.fused += 1
        try:
            return func(*args, **kwargs)
        finally:
            self.shapes.fused -= 1


class Counter:
    """Counts the parts of one model; remembers what it has counted.

    Parameters
    ----------
    model : nn.Module
        The model on the meta device.
    components : Components
        Which module is the vision encoder, the projector, the language model and the head.
    window : int, optional
        Keys that a sliding layer sees, where the decoder has such layers.
    equal_blocks : bool
        Count equal blocks once; without, every block is run.
    """

    def __init__(
        self,
        model: Any,
        components: Any,
        window: int | None = None,
        *,
        equal_blocks: bool = True,
    ) -> None:
        self.model = model
        self.modules = components.resolve(model)
        self.text_config = model.config.get_text_config()
        self.window = window
        self._blocks = EqualBlocks(model, self._image_parts()) if equal_blocks else None
        self._steps: dict[int, Count] = {}
        self._prefills: dict[int, Count] = {}

    def _image_parts(self) -> list[nn.Module]:
        """Components that are remembered as one; not an encoder whose mergers are told apart."""
        encoder = () if self.modules.mergers else (self.modules.vision_encoder,)
        return [*encoder, *self.modules.projector_parts]

    def vision(self, inputs: dict[str, torch.Tensor]) -> tuple[Count, Count]:
        """Run ``get_image_features`` on `inputs`: the encoder, and the rest (the projector)."""
        wanted = inspect.signature(self.model.get_image_features).parameters
        arguments = {name: value for name, value in inputs.items() if name in wanted}
        with self._counting() as read:
            with _spent(self.modules.vision_encoder, read) as encoder, ExitStack() as stack:
                nested = [
                    stack.enter_context(_spent(module, read)) for module in self.modules.mergers
                ]
                self.model.get_image_features(**_with_ones(arguments))
            whole = read()
        mergers = [count for counts in nested for count in counts]
        vision = sum(encoder, Count()) - sum(mergers, Count())
        return vision, whole - vision

    def whole(self, inputs: dict[str, torch.Tensor]) -> Count:
        """Run the whole model on a request, up to its first token."""
        with self._counting() as read:
            self.model(**_with_ones(inputs), logits_to_keep=1, use_cache=True)
            return read()

    def prefill(self, tokens: int) -> Count:
        """Run decoder and head on a prompt; the head on its last position only."""
        if tokens not in self._prefills:
            self._prefills[tokens] = self._decode(tokens, 0)
        return self._prefills[tokens]

    def step(self, cached: int) -> Count:
        """Run one decode step after `cached` tokens."""
        if cached not in self._steps:
            self._steps[cached] = self._decode(1, cached)
        return self._steps[cached]

    def _decode(self, tokens: int, cached: int) -> Count:
        cache = self._cache_of(cached) if cached else self._empty_cache()
        return self._run_decoder(tokens, cache)

    def _run_decoder(self, tokens: int, cache: Any) -> Count:
        decoder, head = self.modules.language_model, self.modules.head
        embeddings = torch.empty(
            1, tokens, self.text_config.hidden_size, device="meta", dtype=self.model.dtype
        )
        inputs = {"inputs_embeds": embeddings, "past_key_values": cache, "use_cache": True}
        with self._counting() as read:
            if any(module is head for module in decoder.modules()):
                decoder(**inputs, logits_to_keep=1)
            else:
                head(decoder(**inputs).last_hidden_state[:, -1:])
            return read()

    def _empty_cache(self) -> Any:
        return DynamicCache(config=self.text_config)

    def _cache_of(self, cached: int) -> Any:
        """A cache as prefill of so many tokens leaves it, with a short one for its model."""
        cache = self._empty_cache()
        for number, short in enumerate(self._short_cache.layers):
            if not isinstance(short, DynamicLayer):
                cache.layers[number] = copied_layer(short)
            elif short.is_initialized:
                states: Any = (short.keys, short.values)
                keys, values = (
                    torch.empty(
                        (*x.shape[:-2], cached, x.shape[-1]), device="meta", dtype=self.model.dtype
                    )
                    for x in states
                )
                cache.layers[number].update(keys, values)
        return cache

    @cached_property
    def _short_cache(self) -> Any:
        cache = self._empty_cache()
        self._prefills[SHORT] = self._run_decoder(SHORT, cache)
        return cache

    def cached_elements(self) -> list[int]:
        """Count the elements that each layer keeps of one token: keys and values."""
        layers: Any = self._short_cache.layers
        return [
            (layer.keys.numel() + layer.values.numel()) // SHORT
            if layer.is_initialized and hasattr(layer, "keys")
            else 0
            for layer in layers
        ]

    @contextmanager
    def _counting(self) -> Iterator[Callable[[], Count]]:
        """Run on shapes only; gives a function that reads the count so far."""
        shapes, flops, known = ShapesOnly(), FlopCounterMode(display=False), [Count()]

        def read() -> Count:
            return Count(flops.get_total_flops(), shapes.launches) + known[0]

        def add(count: Count) -> None:
            known[0] += count

        once = (read, add) if self._blocks else ()
        with ExitStack() as stack:
            for context in (
                torch.no_grad(),
                shapes,
                FusedAttention(shapes, *once),
                flops,
                _batched_experts(self.model),
            ):
                stack.enter_context(context)
            if self._blocks:
                stack.enter_context(self._blocks.running(read, add))
            yield read


def _as_positions(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Masks that have values as the positions they select: a mask without them has no count."""
    positions: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not index.is_meta:
            positions += index.nonzero().unbind(-1)
        else:
            positions.append(index)
    return positions


@contextmanager
def _spent(module: nn.Module, read: Callable[[], Count]) -> Iterator[list[Count]]:
    """What each call of `module` costs."""
    calls: list[Count] = []
    begun: list[Count] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_: begun.append(read())),
        module.register_forward_hook(lambda *_: calls.append(read() - begun.pop())),
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _batched_experts(model: Any) -> Iterator[None]:
    """Run mixtures of experts as batched products, which the counter knows."""
    found: Iterator[Any] = (getattr(module, "config", None) for module in model.modules())
    configs = {id(x): x for x in found if hasattr(x, "_experts_implementation")}.values()
    before = [config._experts_implementation for config in configs]
    try:
        for config in configs:
            config._experts_implementation = "batched_mm"
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._experts_implementation = implementation


def _with_ones(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Ones where only a shape is given: no code takes them for an empty crop or padding."""
    return {
        name: torch.ones((), dtype=value.dtype).expand(value.shape) if value.is_meta else value
        for name, value in inputs.items()
    }
