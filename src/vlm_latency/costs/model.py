"""All costs of one model: FLOPs by every estimator, bytes, launches, memory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_latency.costs.analytic import analytic
from vlm_latency.costs.bytes_moved import bytes_moved, kv_cache_bytes, peak_memory_bytes
from vlm_latency.costs.census import Census, take_census
from vlm_latency.costs.parameter_rule import parameter_rule
from vlm_latency.costs.shapes import PARTS, RequestShape

if TYPE_CHECKING:
    from vlm_latency.costs.counted import Count, Counter

# Of a prompt made only for its image; long enough for any chat template.
TEXT_TOKENS = 256


class CostModel:
    """Costs of requests to one architecture; needs no weights, remembers what it has counted.

    Parameters
    ----------
    architecture : Architecture
        See `vlm_latency.models`. Used are ``model_type``, ``components``, ``parameters``,
        ``meta_model()`` and ``dummy_inputs()``.
    """

    def __init__(self, architecture: Any) -> None:
        self.architecture = architecture
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}
        self._vision: dict[tuple[int, ...], tuple[Count, Count]] = {}

    @cached_property
    def census(self) -> Census:
        """The work of the model's modules."""
        return take_census(
            self.architecture.meta_model(),
            self.architecture.components,
            self.architecture.model_type,
        )

    @cached_property
    def counter(self) -> Counter:
        """What runs the modules on the meta device."""
        from vlm_latency.costs.counted import Counter

        return Counter(
            self.architecture.meta_model(),
            self.architecture.components,
            self.census.sliding_window,
        )

    def flops(self, shape: RequestShape, estimator: str = "analytic") -> dict[str, Any]:
        """FLOPs of each part and ``total``.

        Parameters
        ----------
        shape : RequestShape
            One request, or arrays of many.
        estimator : str
            "analytic", "analytic_causal", "counted" or "rule" (also "parameter_rule").
        """
        if estimator == "counted":
            return self._counted(shape)
        if estimator in ("rule", "parameter_rule"):
            return parameter_rule(self.architecture.parameters, shape)
        causal = estimator == "analytic_causal"
        return analytic(self.census, shape, causal=causal, grid_pairs=self._grid_pairs(shape))

    def bytes_moved(self, shape: RequestShape, dtype: str) -> dict[str, Any]:
        """Bytes of each part and ``total``; see `bytes_moved`."""
        return bytes_moved(self.census, shape, dtype)

    def kv_cache_bytes(self, shape: RequestShape, dtype: str) -> Any:
        """Bytes of the cache at the end; see `kv_cache_bytes`."""
        return kv_cache_bytes(self.census, shape, dtype)

    def peak_memory_bytes(self, shape: RequestShape, dtype: str) -> Any:
        """Bytes at the peak; see `peak_memory_bytes`."""
        return peak_memory_bytes(self.census, shape, dtype)

    def launches(self, shape: RequestShape) -> dict[str, Any]:
        """Operations that each part launches, and ``total``: every eager operation but views.

        Their number depends on the modules, not on the lengths; only an encoder with windows runs
        attention once per window, and is counted at each grid.
        """
        prefill, step = self.counter.prefill(2).launches, self.counter.step(2).launches
        vision, projector = self._per_image(shape, "launches")
        launches = {
            "vision": vision,
            "projector": projector,
            "llm_prefill": np.full_like(np.asarray(shape.num_total_tokens), prefill),
            "llm_decode": shape.decode_steps * step,
        }
        return {**launches, "total": sum(launches.values())}

    def _counted(self, shape: RequestShape) -> dict[str, Any]:
        vision, projector = self._per_image(shape, "flops")
        prompts = np.asarray(shape.num_total_tokens)
        pairs = np.stack([prompts, np.asarray(shape.decode_steps)], axis=-1)
        prefill = self.counter.prefill_flops(np.unique(prompts).tolist())
        wanted = [tuple(pair) for pair in np.unique(pairs.reshape(-1, 2), axis=0).tolist()]
        decode = self.counter.decode_flops(wanted)
        flops = {
            "vision": vision,
            "projector": projector,
            "llm_prefill": _look_up(prompts[..., None], {(n,): f for n, f in prefill.items()}),
            "llm_decode": _look_up(pairs, decode),
        }
        return {**flops, "total": sum(flops.values())}

    def _per_image(self, shape: RequestShape, what: str) -> tuple[Any, Any]:
        """Vision and projector of each request, counted once per distinct image shape."""
        keys = np.stack(
            np.broadcast_arrays(shape.image_width, shape.image_height, *self._image_keys(shape)),
            axis=-1,
        )
        found: dict[tuple[int, ...], tuple[Count, Count]] = {}
        for row in np.unique(keys.reshape(-1, keys.shape[-1]), axis=0).tolist():
            width, height, *key = row
            found[tuple(row)] = self._count_image(width, height, tuple(key))
        return tuple(
            _look_up(keys, {key: getattr(counts[i], what) for key, counts in found.items()})
            for i in (0, 1)
        )

    def _count_image(self, width: int, height: int, key: tuple[int, ...]) -> tuple[Count, Count]:
        from vlm_latency.costs.counted import Count

        if not key[0]:
            return Count(), Count()
        if key not in self._vision:
            inputs = self.architecture.dummy_inputs(width, height, TEXT_TOKENS)
            self._vision[key] = self.counter.vision(inputs)
        return self._vision[key]

    def _image_keys(self, shape: RequestShape) -> tuple[Any, ...]:
        """What an image's cost depends on: crops, patches and tokens, or its grid of patches."""
        keys = (shape.num_crops, shape.num_vision_patches, shape.num_vision_tokens)
        return keys if self.census.windows is None else (*keys, self._grid_pairs(shape))

    def _grid_pairs(self, shape: RequestShape) -> Any:
        """Sum of squared window sizes, where the encoder has windows."""
        windows = self.census.windows
        if windows is None:
            return 0
        sizes = np.stack(np.broadcast_arrays(shape.image_width, shape.image_height), axis=-1)
        found = {(0, 0): 0}
        for width, height in np.unique(sizes.reshape(-1, 2), axis=0).tolist():
            if width:
                found[width, height] = windows.pairs(*self._grid(width, height))
        return _look_up(sizes, found)

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of patches that an image becomes."""
        if (width, height) not in self._grids:
            inputs = self.architecture.dummy_inputs(width, height, TEXT_TOKENS)
            _, rows, cols = inputs["image_grid_thw"][0].tolist()
            self._grids[width, height] = (rows, cols)
        return self._grids[width, height]


def differences(analytic: dict[str, Any], counted: dict[str, Any]) -> dict[str, int]:
    """Largest difference, counted − analytic, of each part where the two disagree.

    >>> differences({"vision": 10, "projector": 4}, {"vision": 10, "projector": 6})
    {'projector': 2}
    """
    gaps = {
        part: np.atleast_1d(np.asarray(counted[part]) - np.asarray(analytic[part]))
        for part in PARTS
        if part in analytic
    }
    return {
        part: int(gap[np.abs(gap).argmax()])
        for part, gap in gaps.items()
        if gap.size and gap.any() and not np.isnan(gap).any()
    }


def _look_up(keys: np.ndarray, values: Mapping[Any, int]) -> Any:
    """The value of each key (last axis); far fewer distinct keys than rows."""
    flat = keys.reshape(-1, keys.shape[-1])
    distinct, where = np.unique(flat, axis=0, return_inverse=True)
    found = np.array([values[tuple(key)] for key in distinct.tolist()], dtype=np.int64)
    return found[where.reshape(-1)].reshape(keys.shape[:-1])
