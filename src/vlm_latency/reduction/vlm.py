"""A loaded model whose requests say by which method their tokens are reduced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vlm_latency.errors import ModelError
from vlm_latency.reduction.methods import Method

if TYPE_CHECKING:
    from PIL import Image

SHRINK = 0.97  # from one image size tried to the next


class Reduced:
    """One model with all methods: hooks are on it only while a request is measured.

    A `vlm_latency.models.interface.LoadedModel`. All methods share one meter, so that they share
    what an engine has compiled, and its cache.

    Parameters
    ----------
    vlm
        A loaded model of transformers.
    methods
        By the names that requests have in ``method``; another name is the model as it is.
    """

    def __init__(self, vlm: Any, methods: Mapping[str, Method]) -> None:
        self.vlm, self.methods = vlm, methods

    def __getattr__(self, name: str) -> Any:
        return getattr(self.vlm, name)

    def prepare(
        self, image: Image.Image, prompt: str, method: str | None = None, keep: float | None = None
    ) -> Any:
        """Prepare a request, its image made smaller where that is the method."""
        chosen = self.methods.get(method or "")
        if chosen is not None and chosen.where == "image":
            image = image.resize(smaller(self.vlm.architecture, image.size, float(keep or 1)))
            chosen = None
        prepared = self.vlm.prepare(image, prompt)
        prepared.reduction = (chosen, keep)
        return prepared

    def place(self, prepared: Any) -> Any:
        """Copy to the device; how it is reduced goes with it."""
        placed = self.vlm.place(prepared)
        placed.reduction = getattr(prepared, "reduction", (None, None))
        return placed

    def meter(self, make: Callable[[Any], Any]) -> Any:
        """Give a meter that puts a request's method on the model while it measures."""
        return ReducingMeter(self.vlm, self.vlm.meter(make))


def smaller(architecture: Any, size: tuple[int, int], keep: float) -> tuple[int, int]:
    """Find the largest image of this shape whose tokens are at most a share of this one's.

    Where the model gives no such number, that with the fewest tokens; the first that has them.
    """
    full = architecture.image_tokens(*size).num_vision_tokens
    best, fewest, scale = size, full, 1.0
    while fewest > keep * full and min(size) * scale > 1:
        scale *= SHRINK
        tried = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
        try:
            found = architecture.image_tokens(*tried).num_vision_tokens
        except Exception:  # processors refuse images that are too small in their own ways
            break
        if found < fewest:
            best, fewest = tried, found
    return best


class ReducingMeter:
    """A meter of `vlm_latency.instrument` around which a method acts."""

    def __init__(self, vlm: Any, inner: Any) -> None:
        if not hasattr(inner, "timeline"):
            raise ModelError(
                "found a model that is simulated; expected one whose tokens can be reduced"
            )
        self.vlm, self.inner = vlm, inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __enter__(self) -> ReducingMeter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.inner.close()

    def __call__(self, prepared: Any, max_new_tokens: int, stop_at_eos: bool = False) -> Any:
        """Measure one request; ``num_vision_tokens_kept`` is what its method kept."""
        timeline = self.inner.timeline
        with self._acting(prepared, timeline.open, timeline.close) as reducer:
            reading = self.inner(prepared, max_new_tokens, stop_at_eos)
        kept = prepared.counts.num_vision_tokens if reducer is None else reducer.kept
        return replace(reading, times={**reading.times, "num_vision_tokens_kept": kept})

    def bare(self, prepared: Any, max_new_tokens: int, stop_at_eos: bool = False) -> Any:
        """Time it without marks."""
        with self._acting(prepared):
            return self.inner.bare(prepared, max_new_tokens, stop_at_eos)

    @contextlib.contextmanager
    def _acting(self, prepared: Any, *listeners: Any) -> Any:
        from vlm_latency.reduction.hooks import Reducer

        method, keep = getattr(prepared, "reduction", (None, None))
        if method is None:
            yield None
            return
        reducer = Reducer(self.vlm, method, float(keep or 1))
        with reducer.acting(prepared.inputs, *listeners):
            yield reducer
