"""All costs of one model: FLOPs by every estimator, bytes, launches, memory."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_latency.contents import Memory
from vlm_latency.costs.analytic import analytic
from vlm_latency.costs.bytes_moved import bytes_moved, kv_cache_bytes, peak_memory_bytes
from vlm_latency.costs.census import take_census
from vlm_latency.costs.curves import count_images, decode_flops, prefill_flops
from vlm_latency.costs.parameter_rule import parameter_rule
from vlm_latency.costs.shapes import PARTS, RequestShape
from vlm_latency.costs.units import CROSS_ATTENTION, NO_WORK, Census
from vlm_latency.records import COST_PARTS

if TYPE_CHECKING:
    from vlm_latency.costs.counted import Counter

logger = logging.getLogger(__name__)

# Of a prompt made only for its image; long enough for any chat template.
TEXT_TOKENS = 256

# What is remembered of an architecture; and of an image.
SECTIONS = ("census", "parameters", "images", "prefill", "step", "checks")
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
        self.memory = _memory(architecture)
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}

    @property
    def does_nothing(self) -> bool:
        """True of the null model, which stands in for a model at no cost."""
        return bool(self.architecture.simulated)

    @cached_property
    def census(self) -> Census:
        """The work of the model's modules."""
        if self.does_nothing:
            return NO_WORK
        known = self.memory["census"]
        if not known:
            known |= take_census(
                self.architecture.meta_model(),
                self.architecture.components,
                self.architecture.model_type,
            ).to_json()
            self.memory.save()
        return Census.from_json(known)

    @cached_property
    def parameters(self) -> Any:
        """Parameters of each component; see `vlm_latency.models.components.Parameters`."""
        known = self.memory["parameters"]
        if not known:
            known |= vars(self.architecture.parameters)
        return SimpleNamespace(**known)

    @cached_property
    def counter(self) -> Counter:
        """What runs the modules on the meta device."""
        from vlm_latency.costs.counted import Counter

        return Counter(
            self.architecture.meta_model(),
            self.architecture.components,
            self.census.sliding_window,
        )

    @property
    def unknown(self) -> dict[str, str]:
        """By part of a request: why its analytic costs are not known. Empty for most models."""
        found = {}
        for part in PARTS:
            names = self.census.unknown_by_part.get(part.split("_")[0], ())
            if names:
                found[part] = f"no rule for {', '.join(names)}"
        if self.census.has_cross_attention:
            found = dict.fromkeys(PARTS, f"the decoder {CROSS_ATTENTION}")
        return found

    def flops(self, shape: RequestShape, estimator: str = "analytic") -> dict[str, Any]:
        """Count the FLOPs of each part and ``total``.

        Parameters
        ----------
        shape : RequestShape
            One request, or arrays of many.
        estimator : str
            "analytic", "analytic_causal", "counted" or "rule". A part that is not known
            (`unknown`) is NaN in the analytic ones.
        """
        if self.does_nothing:
            return _nothing(shape)
        if estimator == "counted":
            return self._counted(shape)
        if estimator == "rule":
            return parameter_rule(self.parameters, shape)
        causal = estimator == "analytic_causal"
        found = analytic(self.census, shape, causal=causal, grid_pairs=self._grid_pairs(shape))
        return without(found, self.unknown)

    def bytes_moved(self, shape: RequestShape, dtype: str) -> dict[str, Any]:
        """Give the bytes of each part and ``total``; see `bytes_moved`."""
        return without(bytes_moved(self.census, shape, dtype), self.unknown)

    def kv_cache_bytes(self, shape: RequestShape, dtype: str) -> Any:
        """Give the bytes of the cache at the end; see `kv_cache_bytes`."""
        return kv_cache_bytes(self.census, shape, dtype) if self.knows_cache else np.nan

    def peak_memory_bytes(self, shape: RequestShape, dtype: str) -> Any:
        """Give the bytes at the peak; see `peak_memory_bytes`."""
        known = self.knows_cache and not self.unknown
        return peak_memory_bytes(self.census, shape, dtype) if known else np.nan

    @cached_property
    def knows_cache(self) -> bool:
        """Whether what the modules keep per token is what a cache on the meta device holds."""
        if "llm_prefill" in self.unknown or self.does_nothing:
            return self.does_nothing
        checks = self.memory["checks"]
        if "cache" not in checks:
            expected = sum(width for width, _ in self.census.kv_widths)
            try:
                checks["cache"] = [expected, sum(self.counter.cached_elements())]
            except Exception as error:  # whatever a model's code raises without values
                logger.debug("the decoder does not run on shapes: %s", error)
                checks["cache"] = [expected, expected]
            self.memory.save()
        expected, seen = checks["cache"]
        return bool(expected == seen)

    def launches(self, shape: RequestShape) -> dict[str, Any]:
        """Count the operations that each part launches, and ``total``: all eager ones but views.

        Their number depends on the modules, not on the lengths; only an encoder with windows runs
        attention once per window, and is counted at each grid.
        """
        if self.does_nothing:
            return _nothing(shape)
        prefill, step = (self._forward(name, 2)[1] for name in ("prefill", "step"))
        vision, projector = self._per_image(shape, "launches")
        launches = {
            "vision": vision,
            "projector": projector,
            "llm_prefill": np.full_like(np.asarray(shape.num_total_tokens), prefill),
            "llm_decode": shape.decode_steps * step,
        }
        self.memory.save()
        if self.census.has_cross_attention:
            return without({**launches, "total": 0}, PARTS)
        return {**launches, "total": sum(launches.values())}

    def does_not_add_up(self, shape: RequestShape) -> str | None:
        """Say why the parts are not the whole model, by the first request that has an image.

        One forward of the whole model on shapes must cost what encoder, projector and decoder
        cost one by one. None where it does, or where the whole does not run on shapes.
        """
        image = next((one for one in shape if one.num_crops), None)
        if image is None or self.does_nothing:
            return None
        checks, key = self.memory["checks"], f"{image.image_width}x{image.image_height}"
        if key not in checks:
            checks[key] = self._gap(image)
            self.memory.save()
        parts, whole = checks[key]
        if parts == whole:
            return None
        return f"a whole forward costs {whole:,} FLOPs, and its parts {parts:,}"

    def _gap(self, image: RequestShape) -> tuple[int, int]:
        """FLOPs of all parts up to the first token, and of the whole forward."""
        inputs = self.architecture.dummy_inputs(image.image_width, image.image_height, TEXT_TOKENS)
        tokens = inputs["input_ids"].shape[1]
        vision, projector = self.counter.vision(inputs)
        prefill = self._forward("prefill", tokens)[0]
        if "vision_token" in self.census.llm.flops:  # by pieces only text can be run
            one = replace(image, num_total_tokens=tokens, num_output_tokens=1)
            prefill = int(self.flops(one)["llm_prefill"])
        try:
            whole = self.counter.whole(inputs).flops
        except Exception as error:  # whatever a model's code raises without values
            logger.debug("the whole model does not run on shapes: %s", error)
            whole = vision.flops + projector.flops + prefill
        return vision.flops + projector.flops + prefill, whole

    def _forward(self, name: str, length: int) -> tuple[int, int]:
        """FLOPs and launches of a ``prefill`` of so many tokens, or of a ``step`` after them."""
        known = self.memory[name]
        if str(length) not in known:
            count = getattr(self.counter, name)(length)
            known[str(length)] = [count.flops, count.launches]
        flops, launches = known[str(length)]
        return flops, launches

    def _counted(self, shape: RequestShape) -> dict[str, Any]:
        vision, projector = self._per_image(shape, "flops")
        prompts = np.asarray(shape.num_total_tokens)
        pairs = np.stack([prompts, np.asarray(shape.decode_steps)], axis=-1)
        prefill = prefill_flops(
            lambda length: self._forward("prefill", length)[0], np.unique(prompts).tolist()
        )
        decode = decode_flops(
            lambda length: self._forward("step", length)[0],
            [tuple(pair) for pair in np.unique(pairs.reshape(-1, 2), axis=0).tolist()],
            self.census.sliding_window,
        )
        self.memory.save()
        flops = {
            "vision": vision,
            "projector": projector,
            "llm_prefill": _look_up(prompts[..., None], {(n,): f for n, f in prefill.items()}),
            "llm_decode": _look_up(pairs, decode),
        }
        if "vision_token" in self.census.llm.flops:  # by pieces only text can be run
            flops["llm_prefill"] = np.where(
                np.asarray(shape.num_vision_tokens) > 0, np.nan, flops["llm_prefill"]
            )
        if self.census.has_cross_attention:
            return without({**flops, "total": 0}, PARTS)
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
        known = self.memory["images"]
        images = {
            tuple(key): size
            for key, size in zip(
                distinct.tolist(), sizes.reshape(-1, 2)[first].tolist(), strict=True
            )
            if key[0] and _name(key) not in known
        }
        # A method that makes an image smaller leaves the request's own: what is counted of that one
        # must neither stand for the crops that were seen nor be remembered as theirs.
        odd = {key: size for key, size in images.items() if not self._cut_so(size, key)}
        own = {key: size for key, size in images.items() if key not in odd}
        known |= {_name(key): counts for key, counts in self._count_images(own).items()}
        known = dict(known)
        for key, size in odd.items():
            known[_name(key)] = self._count_images({key: size})[key]
        none = (0,) * len(COUNTS)
        return tuple(
            _look_up(
                keys,
                {
                    tuple(key): known.get(_name(key), none)[COUNTS.index((part, what))]
                    for key in distinct.tolist()
                },
            )
            for part in ("vision", "projector")
        )

    def _cut_so(self, size: list[int], key: tuple[int, ...]) -> bool:
        """Whether an image of this size becomes the crops and patches of the key."""
        counts = self.architecture.image_tokens(*size)
        return (counts.num_crops, counts.num_vision_patches) == key[:2]

    def _count_images(
        self, images: dict[tuple[int, ...], list[int]]
    ) -> dict[tuple[int, ...], tuple[int, ...]]:
        like: dict[tuple[int, ...], dict[str, Any]] = {}

        def count(key: tuple[int, ...]) -> list[int]:
            width, height = images[key]
            inputs = like.get(key[:2])
            if inputs is None or "image_sizes" not in inputs:
                inputs = like[key[:2]] = self.architecture.dummy_inputs(width, height, TEXT_TOKENS)
            else:  # crops of one shape, and the size that they are put together by
                sizes = inputs["image_sizes"]
                inputs = {**inputs, "image_sizes": sizes.new_tensor([[height, width]])}
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
        keys = np.stack(
            np.broadcast_arrays(shape.image_width, shape.image_height, shape.num_vision_patches),
            axis=-1,
        )
        grids = {
            key: self._grid(*key) if key[0] else (0, 0)
            for key in map(tuple, np.unique(keys.reshape(-1, 3), axis=0).tolist())
        }
        return tuple(
            _look_up(keys, {key: of(*grid) for key, grid in grids.items()})
            for of in (windows.pairs, windows.number)
        )

    def _grid_pairs(self, shape: RequestShape) -> Any:
        traits = self._grid_traits(shape)
        return traits[0] if traits else 0

    def _grid(self, width: int, height: int, patches: int) -> tuple[int, int]:
        """Rows and columns of patches that an image becomes.

        By the rule of the image processor, where that gives the `patches` that were seen; else by
        running it.
        """
        images = self.architecture.preparer.processor.image_processor
        resize = getattr(sys.modules[type(images).__module__], "smart_resize", None)
        if resize is not None:
            cell = images.patch_size * images.merge_size
            limits = images.size["shortest_edge"], images.size["longest_edge"]
            rows, cols = (
                side // images.patch_size for side in resize(height, width, cell, *limits)
            )
            if rows * cols == patches:
                return rows, cols
        if (width, height) not in self._grids:
            inputs = self.architecture.dummy_inputs(width, height, TEXT_TOKENS)
            _, rows, cols = inputs["image_grid_thw"][0].tolist()
            self._grids[width, height] = (rows, cols)
        return self._grids[width, height]


def differences(analytic: dict[str, Any], counted: dict[str, Any]) -> dict[str, int]:
    """Give the largest difference, counted − analytic, of each part where the two disagree.

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


def without(costs: dict[str, Any], parts: Iterable[str]) -> dict[str, Any]:
    """Put NaN for some parts, and for the total if there are any.

    >>> without({"vision": 3, "projector": 4, "total": 7}, ["vision"])
    {'vision': nan, 'projector': 4, 'total': nan}
    """
    parts = [part for part in parts if part in costs]
    return {**costs, **dict.fromkeys([*parts, "total"] if parts else [], np.nan)}


def _memory(architecture: Any) -> Memory:
    """What was counted of an architecture before; of one that its configuration does not tell, none."""
    if getattr(architecture, "own_modules", True):
        return Memory(None, SECTIONS)
    given = architecture.config, str(architecture.component_overrides)
    return Memory.of("costs", SECTIONS, *given)


def _name(key: Iterable[int]) -> str:
    return ",".join(map(str, key))


def _nothing(shape: RequestShape) -> dict[str, Any]:
    return dict.fromkeys(COST_PARTS, np.zeros_like(shape.num_total_tokens))


def _look_up(keys: np.ndarray, values: Mapping[Any, int]) -> Any:
    """The value of each key (last axis); far fewer distinct keys than rows."""
    flat = keys.reshape(-1, keys.shape[-1])
    distinct, where = np.unique(flat, axis=0, return_inverse=True)
    found = np.array([values[tuple(key)] for key in distinct.tolist()], dtype=np.int64)
    return found[where.reshape(-1)].reshape(keys.shape[:-1])
