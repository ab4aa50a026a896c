"""All costs of one model: FLOPs by every estimator, bytes, launches, memory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_latency.costs.analytic import analytic
from vlm_latency.costs.bytes_moved import bytes_moved, kv_cache_bytes, peak_memory_bytes
from vlm_latency.costs.census import NO_WORK, Census, take_census
from vlm_latency.costs.parameter_rule import parameter_rule
from vlm_latency.costs.shapes import PARTS, RequestShape

if TYPE_CHECKING:
    from vlm_latency.costs.counted import Counter

# Of a prompt made only for its image; long enough for any chat template.
TEXT_TOKENS = 256

# What is remembered of an image.
COUNTS = tuple((part, what) for part in ("vision", "projector") for what in ("flops", "launches"))


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
        self._images: dict[tuple[int, ...], tuple[int, ...]] = {}

    @property
    def does_nothing(self) -> bool:
        """True of the null model, which stands in for a model at no cost."""
        return bool(self.architecture.simulated)

    @cached_property
    def census(self) -> Census:
        """The work of the model's modules."""
        if self.does_nothing:
            return NO_WORK
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
        if self.does_nothing:
            return _nothing(shape)
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
        if self.does_nothing:
            return _nothing(shape)
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
        """FLOPs or launches of vision and projector, counted once per distinct image."""
        keys = np.stack(
            np.broadcast_arrays(
                shape.num_crops,
                shape.num_vision_patches,
                shape.num_vision_tokens,
                *self._grid_traits(shape),
            ),
            axis=-1,
        )
        sizes = np.stack(np.broadcast_arrays(shape.image_width, shape.image_height), axis=-1)
        distinct, first = np.unique(keys.reshape(-1, keys.shape[-1]), axis=0, return_index=True)
        images = {
            tuple(key): size
            for key, size in zip(
                distinct.tolist(), sizes.reshape(-1, 2)[first].tolist(), strict=True
            )
            if key[0] and tuple(key) not in self._images
        }
        self._images.update(self._count_images(images))
        none = (0,) * len(COUNTS)
        return tuple(
            _look_up(
                keys,
                {
                    tuple(key): self._images.get(tuple(key), none)[COUNTS.index((part, what))]
                    for key in distinct.tolist()
                },
            )
            for part in ("vision", "projector")
        )

    def _count_images(
        self, images: dict[tuple[int, ...], list[int]]
    ) -> dict[tuple[int, ...], tuple[int, ...]]:
        from vlm_latency.costs.counted import count_images

        def count(key: tuple[int, ...]) -> list[int]:
            inputs = self.architecture.dummy_inputs(*images[key], TEXT_TOKENS)
            parts = dict(zip(("vision", "projector"), self.counter.vision(inputs), strict=True))
            return [getattr(parts[part], what) for part, what in COUNTS]

        # Attention is quadratic within a crop.
        traits = {key: (1, *key, key[1] ** 2 // key[0]) for key in images}
        return count_images(traits, count)

    def _grid_traits(self, shape: RequestShape) -> tuple[Any, ...]:
        """Of an encoder with windows: their squared sizes and their number."""
        windows = self.census.windows
        if windows is None:
            return ()
        sizes = np.stack(np.broadcast_arrays(shape.image_width, shape.image_height), axis=-1)
        grids = {(0, 0): (0, 0)}
        for width, height in np.unique(sizes.reshape(-1, 2), axis=0).tolist():
            if width:
                grids[width, height] = self._grid(width, height)
        return tuple(
            _look_up(sizes, {size: of(*grid) for size, grid in grids.items()})
            for of in (windows.pairs, windows.number)
        )

    def _grid_pairs(self, shape: RequestShape) -> Any:
        traits = self._grid_traits(shape)
        return traits[0] if traits else 0

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


def _nothing(shape: RequestShape) -> dict[str, Any]:
    return dict.fromkeys((*PARTS, "total"), np.zeros_like(shape.num_total_tokens))


def _look_up(keys: np.ndarray, values: Mapping[Any, int]) -> Any:
    """The value of each key (last axis); far fewer distinct keys than rows."""
    flat = keys.reshape(-1, keys.shape[-1])
    distinct, where = np.unique(flat, axis=0, return_inverse=True)
    found = np.array([values[tuple(key)] for key in distinct.tolist()], dtype=np.int64)
    return found[where.reshape(-1)].reshape(keys.shape[:-1])
