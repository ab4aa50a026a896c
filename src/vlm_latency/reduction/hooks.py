"""What puts a method on a model for one request: hooks that leave with the prefill."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlm_latency.errors import ModelError
from vlm_latency.models.boundaries import blocks_of, replaced
from vlm_latency.reduction.methods import Method, Seen

REDUCTION = "T_reduction"
_WATCHED = "vlm_latency_watched"
# What the decoder is given besides what is shortened here.
_LENGTHLESS = ("past_key_values", "use_cache", "cache_position", "logits_to_keep", "return_dict")

Listener = Callable[[str], None]


def image_positions(config: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Find the positions of a prompt that carry an image feature, in order.

    Raises
    ------
    ModelError
        For a model whose prompt does not say where they are.
    """
    if "image_input_idx" in inputs:  # Molmo adds features there
        index = inputs["image_input_idx"]
        return index[index >= 0].unique()
    token = getattr(config, "image_token_id", None)
    if token is None:
        raise ModelError(
            f"tokens of {config.model_type} cannot be reduced: neither image_input_idx nor "
            "image_token_id says where its prompt has an image"
        )
    return (inputs["input_ids"][0] == token).nonzero()[:, 0]


class Reducer:
    """One method at one share on one loaded model.

    Parameters
    ----------
    vlm
        A loaded model of transformers.
    method, keep
        What acts, and the share of vision tokens that it keeps.

    Attributes
    ----------
    kept
        Vision tokens kept in the last request; None before.
    """

    def __init__(self, vlm: Any, method: Method, keep: float) -> None:
        self.vlm, self.method, self.keep = vlm, method, keep
        self.kept: int | None = None
        self._attention: torch.Tensor | None = None

    @contextlib.contextmanager
    def acting(
        self,
        inputs: dict[str, torch.Tensor],
        on_open: Listener = lambda _: None,
        on_close: Listener = lambda _: None,
    ) -> Iterator[None]:
        """Reduce the first forward's tokens, for one request.

        Where the image is in the prompt is found here, before anything is timed; all else that
        the method does lies between ``on_open("T_reduction")`` and ``on_close``.
        """
        self._open, self._close = (lambda: on_open(REDUCTION)), (lambda: on_close(REDUCTION))
        self.inputs = inputs
        self.positions = image_positions(self.vlm.model.config, inputs)
        self._length = inputs["input_ids"].shape[1]
        rest = torch.ones(self._length, dtype=torch.bool, device=self.positions.device)
        rest[self.positions] = False
        self._text = rest.nonzero()[:, 0]
        self._attention = None
        self._order: torch.Tensor | None = None
        with contextlib.ExitStack() as stack:
            if self.method.where == "decoder":
                if self.method.needs_attention:
                    stack.enter_context(watching(_watched_block(self.vlm), self._encoder_attends))
                self._hook(
                    stack, self.vlm.components.language_model, self._shorten_decoder, once=True
                )
            elif self.method.where == "layer":
                layers = blocks_of(self.vlm.components.language_model)
                first = self.method.layer
                if not 0 < first < len(layers):
                    raise ModelError(
                        f"{type(self.method).__name__} acts before layer {first}; expected one of "
                        f"1 … {len(layers) - 1}, the layers of this decoder"
                    )
                if self.method.needs_attention:
                    stack.enter_context(watching(layers[first - 1], self._last_attends))
                for layer in layers[first:]:
                    self._hook(stack, layer, self._shorten_layer, once=False)
            yield

    def _hook(
        self, stack: contextlib.ExitStack, module: nn.Module, function: Any, once: bool
    ) -> None:
        def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
            if once:  # decode steps go without, compiled or not
                handle.remove()
            return function(args, kwargs)

        handle = module.register_forward_pre_hook(before, with_kwargs=True)
        stack.callback(handle.remove)

    # Before the decoder

    def _shorten_decoder(self, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._open()
        embeds = kwargs["inputs_embeds"]
        shortened = ("inputs_embeds", "position_ids", "attention_mask", *_LENGTHLESS)
        for name, value in kwargs.items():
            if name not in shortened and isinstance(value, torch.Tensor | list):
                raise ModelError(
                    f"tokens of {type(self.vlm.model).__name__} cannot be reduced: its decoder is "
                    f"given {name} besides, and how that is shortened is not known"
                )
        embeds, order = self._chosen(embeds)
        kwargs = {**kwargs, "inputs_embeds": embeds}
        if (positions := kwargs.get("position_ids")) is not None:
            kwargs["position_ids"] = positions[..., order]
        kwargs["attention_mask"] = _shortened_mask(kwargs.get("attention_mask"), order)
        self._close()
        return args, kwargs

    def _chosen(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States (1, n, d) of the tokens kept, and their places in the prompt, ascending."""
        features = states[0, self.positions]
        count = max(1, round(self.keep * len(features)))
        found = self.method.select(Seen(features, count, self._attention))
        if found.features is not None:
            states = states.index_copy(1, self.positions[found.index], found.features[None])
        order = torch.cat([self._text, self.positions[found.index]]).sort().values
        self.kept = len(found.index)
        return states[:, order], order

    # Between two layers

    def _shorten_layer(self, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        states = args[0] if args else kwargs["hidden_states"]
        if states.shape[1] == 1:  # a decode step sees all that its layer holds
            return args, {**kwargs, "attention_mask": None}
        self._open()
        if self._order is None:
            states, self._order = self._chosen(states)
            self._attention = None
        order = self._order
        kwargs = dict(kwargs)
        if args:
            args = (states, *args[1:])
        else:
            kwargs["hidden_states"] = states
        kwargs["attention_mask"] = _shortened_mask(kwargs.get("attention_mask"), order)
        if (positions := kwargs.get("position_ids")) is not None:
            kwargs["position_ids"] = positions[..., order]
        if (rotations := kwargs.get("position_embeddings")) is not None:
            kwargs["position_embeddings"] = tuple(part[..., order, :] for part in rotations)
        self._close()
        return args, kwargs

    # Attention weights

    def _last_attends(self, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        if query.shape[2] > 1:
            self._open()
            weights = _weights(query[:, :, -1:], key, scaling)
            self._attention = weights.mean(dim=1)[0, 0, self.positions]
            self._close()

    def _encoder_attends(self, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        self._open()
        kind = self.vlm.model.config.model_type
        self._attention = _SCORES[kind](self, query, key, scaling)
        self._close()


@contextlib.contextmanager
def watching(block: nn.Module, see: Callable[[torch.Tensor, torch.Tensor, float], None]) -> Any:
    """Show the queries and keys of a block's attention, which runs as it would by itself."""
    attention: Any = next(
        (m for name, m in block.named_children() if name in ("self_attn", "attention", "attn")),
        None,
    )
    config = getattr(attention, "config", None)
    if config is None:
        raise ModelError(f"{type(block).__name__} has no attention that can be watched")
    usual = config._attn_implementation
    eager: Any = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
    ) -> Any:
        see(query, key, kwargs.get("scaling") or query.shape[-1] ** -0.5)
        flash = "flash" in usual and query.dtype == torch.float32  # which flash does not take
        run = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa" if flash else usual, eager)
        return run(module, query, key, value, attention_mask, **kwargs)

    watched = copy.copy(config)
    watched._attn_implementation_internal = _WATCHED
    ALL_ATTENTION_FUNCTIONS[_WATCHED] = attend
    try:
        with replaced(attention, "config", lambda _: watched):
            yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[_WATCHED]


def _shortened_mask(mask: Any, order: torch.Tensor) -> Any:
    """A mask of tokens falls away, one request having no padding; one of pairs is shortened."""
    if isinstance(mask, dict):
        return {name: _shortened_mask(each, order) for name, each in mask.items()}
    if mask is None or mask.ndim == 2:
        return None
    return mask[..., order, :][..., order]


def _weights(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention weights (batch, heads, queries, keys); heads may share keys."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return (query @ key.transpose(2, 3) * scaling).softmax(dim=-1, dtype=torch.float32)


# What each patch gets of the encoder's attention, brought to the order of the prompt's tokens.


def _watched_block(vlm: Any) -> nn.Module:
    """The block of the encoder whose attention tells."""
    config, encoder = vlm.model.config, vlm.components.vision_encoder
    kind = config.model_type
    if kind not in _SCORES:
        raise ModelError(
            f"the encoder's attention of {kind} cannot be used: how its patches become tokens is "
            f"known for {', '.join(_SCORES)}"
        )
    if kind == "molmo":
        return encoder.layers[encoder.feature_layers[0]]
    if kind == "qwen2_5_vl":
        return encoder.blocks[encoder.fullatt_block_indexes[-1]]
    return blocks_of(encoder)[config.vision_feature_layer]


def _class_token(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """What the class token gives to each patch: (crops, patches)."""
    return _weights(query[:, :, :1], key, scaling).mean(dim=1)[:, 0, 1:]


def _of_llava(reducer: Reducer, *attention: Any) -> torch.Tensor:
    return _class_token(*attention).flatten()


def _of_internvl(reducer: Reducer, *attention: Any) -> torch.Tensor:
    scores, model = _class_token(*attention), reducer.vlm.model
    side = round(scores.shape[1] ** 0.5)
    square = scores.view(-1, side, side, 1)
    shuffled = model.base_model.pixel_shuffle(square, model.config.downsample_ratio)
    return shuffled.mean(dim=-1).flatten()


def _of_molmo(reducer: Reducer, *attention: Any) -> torch.Tensor:
    scores, inputs = _class_token(*attention), reducer.inputs
    side = round(scores.shape[1] ** 0.5)
    pooled = nn.functional.avg_pool2d(scores.view(-1, 1, side, side), 2).flatten()
    # Unused vectors fall on one more position, which nothing reads: no wait for the device.
    length = inputs["input_ids"].shape[1]
    index = inputs["image_input_idx"].flatten()
    spread = pooled.new_zeros(length + 1)
    spread = spread.index_copy(0, index.masked_fill(index < 0, length), pooled)
    return spread[reducer.positions]


def _of_qwen(reducer: Reducer, *attention: Any) -> torch.Tensor:
    from transformers.vision_utils import get_vision_window_index

    encoder = reducer.vlm.components.vision_encoder
    scores = _weights(*attention).mean(dim=(1, 2)).flatten()
    merged = scores.view(-1, encoder.spatial_merge_unit).mean(dim=-1)
    order, _ = get_vision_window_index(
        reducer.inputs["image_grid_thw"],
        spatial_merge_size=encoder.spatial_merge_size,
        window_size=encoder.window_size,
        patch_size=encoder.patch_size,
        kwargs={},
    )
    return merged[order.to(merged.device).argsort()]


_SCORES: dict[str, Callable[..., torch.Tensor]] = {
    "llava": _of_llava,
    "internvl": _of_internvl,
    "molmo": _of_molmo,
    "qwen2_5_vl": _of_qwen,
}
